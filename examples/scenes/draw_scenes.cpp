// Streams endless scenes with questions to standard output, for train/train.py.
//
// draw_scenes MNIST_FOLDER train|t10k VOCABULARY SEED MIN_DIGITS MAX_DIGITS TURNS
//
// One record a picture, all bytes:
//   pixels  [96, 96, 3]  RGB
//   owner   [96, 96]     0 = background, i + 1 = ink of digit i
//   digits  [6, 4]       digit, colour, centre x, centre y; 255 where there is none
//   turns   [TURNS, 36]  kind, question tokens q, answer tokens a, 0, then q + a token ids, padded with <pad>
#include <cstdio>
#include <exception>
#include <string>

#include "scene.hpp"
#include "words.hpp"

namespace {

constexpr std::size_t turn_bytes = 36;

std::uint8_t byte(std::size_t value) { return static_cast<std::uint8_t>(value); }

std::vector<std::uint8_t> turn_record(const scenes::Question& question, const scenes::Vocabulary& vocabulary) {
  const std::vector<int> prompt = vocabulary.after(question.text);
  std::vector<int> answer = vocabulary.encode(question.answer);
  answer.push_back(vocabulary.end());
  std::vector<std::uint8_t> record{byte(static_cast<std::size_t>(question.kind)), byte(prompt.size()),
                                   byte(answer.size()), 0};
  for (const int token : prompt) record.push_back(byte(static_cast<std::size_t>(token)));
  for (const int token : answer) record.push_back(byte(static_cast<std::size_t>(token)));
  if (record.size() > turn_bytes) throw std::logic_error("a turn is longer than its record");
  record.resize(turn_bytes, byte(static_cast<std::size_t>(vocabulary.id("<pad>"))));
  return record;
}

int run(char** args) {
  const scenes::Mnist mnist = scenes::read_mnist(args[1], args[2]);
  const scenes::DigitBox box(mnist);
  const scenes::Vocabulary vocabulary(args[3]);
  scenes::Random random(std::stoull(args[4]));
  const int low = std::stoi(args[5]), high = std::stoi(args[6]), turns = std::stoi(args[7]);
  if (low < 1 || high > scenes::max_digits || low > high || turns < 0)
    throw std::invalid_argument("digits must be between 1 and 6 and turns must not be negative");
  for (;;) {
    const scenes::Scene scene = scenes::draw_scene(random.between(low, high), box, random);
    std::vector<std::uint8_t> record = scene.pixels;
    record.insert(record.end(), scene.owner.begin(), scene.owner.end());
    for (std::size_t i = 0; i < static_cast<std::size_t>(scenes::max_digits); ++i) {
      const bool real = i < scene.digits.size();
      const scenes::Digit d = real ? scene.digits[i] : scenes::Digit{255, 255, 255, 255};
      for (const int value : {d.digit, d.colour, d.x, d.y}) record.push_back(byte(static_cast<std::size_t>(value)));
    }
    // Every kind comes equally often: a shuffled deck of the five, dealt again when it is empty.
    std::vector<scenes::Kind> deck;
    for (int turn = 0; turn < turns; ++turn) {
      if (deck.empty()) {
        deck = {scenes::Kind::colour, scenes::Kind::digit, scenes::Kind::place, scenes::Kind::count,
                scenes::Kind::list};
        random.shuffle(deck);
      }
      const auto bytes = turn_record(scenes::ask(deck.back(), scene, random), vocabulary);
      deck.pop_back();
      record.insert(record.end(), bytes.begin(), bytes.end());
    }
    if (std::fwrite(record.data(), 1, record.size(), stdout) != record.size()) return 0;  // the reader has gone
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "usage: %s MNIST_FOLDER train|t10k VOCABULARY SEED MIN_DIGITS MAX_DIGITS TURNS\n", argv[0]);
    return 2;
  }
  try {
    return run(argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "draw_scenes: %s\n", error.what());
    return 2;
  }
}
