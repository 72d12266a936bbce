// save_scenes MNIST_FOLDER SEED COUNT FOLDER : draws COUNT scenes from MNIST's test files as FOLDER/scene_NN.png, and
// writes one question of each kind about each, with its answer, to FOLDER/questions.json.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "../common/picture.hpp"
#include "scene.hpp"

int main(int argc, char** argv) {
  using namespace scenes;
  using namespace common;
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s MNIST_FOLDER SEED COUNT FOLDER\n", argv[0]);
    return 2;
  }
  try {
    const Mnist mnist = read_mnist(argv[1], "t10k");
    const DigitBox box(mnist);
    Random random(std::stoull(argv[2]));
    const int count = std::stoi(argv[3]);
    const std::string folder = argv[4];
    nlohmann::json questions = nlohmann::json::array();
    for (int i = 0; i < count; ++i) {
      const Scene scene = draw_scene(random.between(1, max_digits), box, random);
      char name[32];
      std::snprintf(name, sizeof(name), "scene_%02d.png", i);
      save_png({picture_side, picture_side, scene.pixels}, folder + "/" + name);
      for (std::size_t kind = 0; kind < kind_names.size(); ++kind) {
        const Question question = ask(static_cast<Kind>(kind), scene, random);
        questions.push_back(
            {{"picture", name}, {"kind", kind_names[kind]}, {"question", question.text}, {"answer", question.answer}});
      }
    }
    std::ofstream(folder + "/questions.json") << questions.dump(1) << "\n";
  } catch (const std::exception& error) {
    std::fprintf(stderr, "save_scenes: %s\n", error.what());
    return 2;
  }
}
