// Asks the scenes model about a picture, with and without FastV, and draws what was kept.
//
// scenes_demo [PICTURE] [QUESTION] [options]; see --help.
#include <cstdio>

#include "../common/command_line.hpp"
#include "assistant.hpp"
#include "drawing.hpp"

namespace {

using command_line::one_of;
using command_line::real_number;
using command_line::refuse;
using command_line::whole_number;
using scenes::Answer;
using scenes::Assistant;
using scenes::Prompt;

struct Options {
  std::string picture = FASTV_SCENES_FOLDER "/pictures/scene_02.png";
  std::string question = "where is the red 8 ?";
  std::string model = FASTV_SCENES_FOLDER "/model";
  std::string out = "fastv_demo.png";
  fastv::Config pruning;  // the paper's defaults: K = 2, R = 0.5
  bool help = false;
};

// ---- the command line ---------------------------------------------------------------------------

void set(Options& options, const std::string& option, const std::string& value) {
  fastv::Config& pruning = options.pruning;
  if (option == "--k") {
    pruning.filtering_layer = whole_number(option, value);
  } else if (option == "--r") {
    pruning.filtering_ratio = real_number(option, value);
  } else if (option == "--keep") {
    pruning.keep_count = whole_number(option, value);
  } else if (option == "--score") {
    pruning.score_rows =
        one_of<fastv::ScoreRows>(option, value, {{"last", fastv::ScoreRows::last}, {"all", fastv::ScoreRows::all}});
  } else if (option == "--select") {
    using fastv::Selection;
    pruning.selection = one_of<Selection>(
        option, value, {{"top_k", Selection::top_k}, {"random", Selection::random}, {"uniform", Selection::uniform}});
  } else if (option == "--seed") {
    pruning.seed = whole_number(option, value);
  } else if (option == "--out") {
    options.out = value;
  } else if (option == "--model") {
    options.model = value;
  } else {
    refuse("there is no option " + option + "; --help lists them all");
  }
}

// Both "--k 2" and "--k=2".
Options read_options(int count, char** arguments) {
  static const std::vector<std::string> with_value = {"--k",      "--r",    "--keep", "--score",
                                                      "--select", "--seed", "--out",  "--model"};
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      options.help = true;
    } else if (argument.size() > 1 && argument[0] == '-') {
      const std::size_t equals = argument.find('=');
      const std::string name = argument.substr(0, equals);
      const bool known = std::find(with_value.begin(), with_value.end(), name) != with_value.end();
      if (known && equals == std::string::npos && i + 1 == count) refuse("a value is missing after " + name);
      set(options, name, equals != std::string::npos ? argument.substr(equals + 1) : known ? arguments[++i] : "");
    } else {
      places.push_back(argument);
    }
  }
  if (places.size() > 2) refuse("\"" + places[2] + "\" is one argument too many: put the question in quotation marks");
  if (!places.empty()) options.picture = places[0];
  if (places.size() > 1) options.question = places[1];
  return options;
}

void print_help(const Options& options) {
  std::printf(
      "usage: sh examples/demo.sh [PICTURE] [QUESTION] [options]\n"
      "\n"
      "Asks a small LLaVA about a picture, with all of its visual tokens and with FastV, and draws which patches\n"
      "stayed and why.\n"
      "\n"
      "  PICTURE       a PNG or JPEG file of any size; it is padded to a square and resized\n"
      "  QUESTION      in quotation marks\n"
      "  --k N         filtering layer K: layers that run on the whole prompt (2)\n"
      "  --r X         filtering ratio R: share of the visual tokens that is dropped then, 0 to 1 (0.5)\n"
      "  --keep N      keep exactly N visual tokens, whatever R says\n"
      "  --score S     rank by the attention of the last prompt token, or by the mean of all: last, all (last)\n"
      "  --select S    keep the top_k of the ranking, a random set or a uniform grid (top_k)\n"
      "  --seed N      of the random set (0)\n"
      "  --out FILE    where the drawing goes, .png or .svg (fastv_demo.png)\n"
      "  --model DIR   folder of the model\n"
      "\n"
      "The model was taught nothing but pictures of 192 x 192 pixels with one to twelve handwritten digits in eight\n"
      "colours, in cells of six rows and six columns, on a dark noisy background. It answers these questions:\n"
      "\n"
      "  what is at row 2 column 5 ?            a colour and a digit, or nothing\n"
      "  where is the red 7 ?                   row 1 column 3\n"
      "  how many red digits are there ?        0 ... 12\n"
      "  list the digits in row 4 .             3 7 0, or none\n"
      "  what is right of the red 7 ?           the next digit in its row, or nothing\n"
      "\n"
      "All words it knows:\n");
  const scenes::Vocabulary vocabulary(options.model + "/vocab.txt");
  std::string line = " ";
  for (int id = 0; id < vocabulary.size(); ++id) {
    const std::string& word = vocabulary.word(id);
    if (word.empty() || word.front() == '<') continue;  // <s> and its like
    if (line.size() + word.size() > 100) {
      std::printf("%s\n", line.c_str());
      line = " ";
    }
    line += " " + word;
  }
  std::printf("%s\n", line.c_str());
}

// ---- what is measured ---------------------------------------------------------------------------

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

struct Run {
  Answer answer;
  double seconds = 0;  // prefill, median
};

// Both ways of reading the prompt, timed in turns so that both see the same moods of the machine.
std::pair<Run, Run> run_both(const Assistant& assistant, const Prompt& prompt, const fastv::Config& pruning) {
  constexpr int repetitions = 3;
  Run full{assistant.answer(prompt)}, pruned{assistant.answer(prompt, pruning)};  // these warm up, too
  std::vector<double> full_seconds, pruned_seconds;
  for (int i = 0; i < repetitions; ++i) {
    full_seconds.push_back(assistant.prefill_seconds(prompt));
    pruned_seconds.push_back(assistant.prefill_seconds(prompt, pruning));
  }
  full.seconds = median(full_seconds);
  pruned.seconds = median(pruned_seconds);
  return {full, pruned};
}

// ---- words for numbers --------------------------------------------------------------------------

using common::format;

// "layers 0-1: 621, layers 2-11: 333"
std::string layers_text(const fastv::Plan& plan) {
  const auto range = [&](std::size_t first, std::size_t end) {
    const std::string name = end - first == 1 ? "layer " + std::to_string(first)
                                              : "layers " + std::to_string(first) + "-" + std::to_string(end - 1);
    return name + ": " + std::to_string(plan.tokens_in_layer(first));
  };
  const std::size_t k = plan.stages == 0 ? 0 : plan.stage[0].filtering_layer;
  if (k == 0) return range(0, plan.layers);
  return range(0, k) + ", " + range(k, plan.layers);
}

// In the thousands, millions or billions that suit `whole`, so that numbers in one column can be compared.
std::string amount(double value, double whole, const char* unit) {
  const double unit_size = whole >= 1e9 ? 1e9 : whole >= 1e6 ? 1e6 : whole >= 1e3 ? 1e3 : 1;
  const char* prefix = whole >= 1e9 ? " G" : whole >= 1e6 ? " M" : whole >= 1e3 ? " k" : " ";
  return format(whole / unit_size < 10 ? "%.2f" : "%.1f", value / unit_size) + prefix + unit;
}

std::string part(double value, double whole) { return " (" + format("%.0f%%", 100 * value / whole) + ")"; }

// The table: how many tokens each layer ran on, and what that cost.
std::vector<scenes::FigureRow> table(const fastv::ModelShape& shape, const std::string& name, const Run& full,
                                     const Run& pruned) {
  const auto flops = [&](const Run& run) { return fastv::prefill_flops(shape, run.answer.plan); };
  const auto bytes = [&](const Run& run) {
    return static_cast<double>(fastv::kv_bytes(shape, run.answer.plan, sizeof(float)));
  };
  const auto cells = [&](const Run& run, bool compared) {
    const auto cell = [&](double value, double whole, const std::string& text) {
      return compared ? text + part(value, whole) : text;
    };
    return std::vector<std::string>{layers_text(run.answer.plan),
                                    cell(flops(run), flops(full), amount(flops(run), flops(full), "FLOPs")),
                                    cell(bytes(run), bytes(full), amount(bytes(run), bytes(full), "B")),
                                    cell(run.seconds, full.seconds, format("%.2f ms", run.seconds * 1e3))};
  };
  return {{"all tokens", cells(full, false)}, {name, cells(pruned, true)}};
}

const std::vector<std::string> table_heads = {"tokens", "prefill", "KV cache", "prefill time"};

// A random set is not FastV.
std::string name_of(const fastv::Config& pruning) {
  switch (pruning.selection) {
    case fastv::Selection::top_k: return "FastV";
    case fastv::Selection::random: return "random";
    case fastv::Selection::diverse: return "diverse";
    case fastv::Selection::uniform: break;
  }
  return "uniform";
}

// "K = 2, R = 0.5" or "K = 2, 10 kept", and the rows where they are not the default.
std::string settings_text(const fastv::Config& pruning) {
  std::string text = "K = " + std::to_string(pruning.filtering_layer) + ", ";
  if (pruning.keep_count != fastv::by_ratio)
    text += std::to_string(pruning.keep_count) + " kept";
  else
    text += "R = " + format("%g", pruning.filtering_ratio);
  const bool all = pruning.selection == fastv::Selection::top_k && pruning.score_rows == fastv::ScoreRows::all;
  return all ? text + ", all rows" : text;
}

// ---- the output ---------------------------------------------------------------------------------

void print_report(const std::string& question, const Answer& full, const Answer& pruned, const fastv::Config& pruning,
                  const std::vector<scenes::FigureRow>& rows) {
  std::printf("Question     %s\n", question.c_str());
  const int width = static_cast<int>((std::max)(full.text.size(), pruned.text.size())) + 3;
  std::printf("%-13s%-*s%zu visual tokens\n", "all tokens", width, full.text.c_str(), full.plan.visual);
  std::printf("%-13s%-*s%zu of them from layer %zu on (%s)\n\n", name_of(pruning).c_str(), width, pruned.text.c_str(),
              pruned.plan.kept_visual(), pruning.filtering_layer, settings_text(pruning).c_str());
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < table_heads.size(); ++i) {
    std::size_t widest = table_heads[i].size();
    for (const auto& row : rows) widest = (std::max)(widest, row.cells[i].size());
    widths.push_back(widest + 3);
  }
  const auto print_row = [&](const std::string& name, const std::vector<std::string>& cells) {
    std::string line = name + std::string(13 - name.size(), ' ');
    for (std::size_t i = 0; i < cells.size(); ++i) line += cells[i] + std::string(widths[i] - cells[i].size(), ' ');
    line.erase(line.find_last_not_of(' ') + 1);
    std::printf("%s\n", line.c_str());
  };
  print_row("", table_heads);
  for (const auto& row : rows) print_row(row.name, row.cells);
}

// Attention per visual token over attention per text token, in the mean of the layers first .. end-1.
double efficiency(const std::vector<double>& share, double visual, double text, std::size_t first, std::size_t end) {
  double mean = 0;
  for (std::size_t layer = first; layer < end; ++layer) mean += share[layer] / static_cast<double>(end - first);
  return (mean / visual) / ((1 - mean) / text);
}

std::string score_caption(const fastv::Config& pruning, std::size_t layer) {
  const std::string where = "in layer " + std::to_string(layer) + ", mean over heads";
  if (pruning.selection != fastv::Selection::top_k)
    return "Attention of the last prompt token " + where + ". This selection does not look at it.";
  if (pruning.score_rows == fastv::ScoreRows::all) return "Attention of all prompt tokens " + where + " and rows.";
  return "Attention of the last prompt token " + where + ".";
}

scenes::Figure figure(const Assistant& assistant, const Prompt& prompt, const common::Picture& picture,
                      const fastv::Config& pruning, const Answer& full, const Answer& pruned) {
  const scenes::Matrix attention = assistant.attention(prompt);  // [layers, n]
  const auto first = static_cast<Eigen::Index>(prompt.visual.first),
             count = static_cast<Eigen::Index>(prompt.visual.count);
  const std::size_t layers = assistant.shape().layers, k = pruning.filtering_layer, scored = k == 0 ? 0 : k - 1;

  scenes::Figure out;
  out.picture = picture;
  out.columns = assistant.columns();
  out.filtering_layer = k;
  out.kept.resize(prompt.visual.count);
  for (const fastv::Index patch : pruned.kept) out.kept[patch] = true;
  out.scores = pruned.scores;
  if (out.scores.empty()) {
    const auto row = attention.row(static_cast<Eigen::Index>(scored)).segment(first, count);
    out.scores.assign(row.begin(), row.end());
  }
  for (Eigen::Index layer = 0; layer < attention.rows(); ++layer)
    out.share.push_back(static_cast<double>(attention.row(layer).segment(first, count).sum()));

  const double visual = static_cast<double>(count), text = static_cast<double>(prompt.tokens()) - visual;
  out.answers = {{"all " + std::to_string(full.plan.visual) + " visual tokens:", full.text},
                 {name_of(pruning) + ", " + std::to_string(pruned.plan.kept_visual()) + " of them:", pruned.text}};
  out.kept_caption = std::to_string(pruned.plan.kept_visual()) + " of " + std::to_string(pruned.plan.visual) +
                     " kept (" + settings_text(pruning) + "); the others are faded.";
  out.score_caption = score_caption(pruning, scored);
  out.share_caption = "Of the last prompt token, without pruning. " + format("%.0f%%", 100 * visual / (visual + text)) +
                      " of the tokens are visual; from layer " + std::to_string(k) + " on each gets " +
                      format("%.2g", efficiency(out.share, visual, text, k, layers)) +
                      " times the attention of a text token.";
  return out;
}

// ---- the demo -----------------------------------------------------------------------------------

// The model was taught with a mark at every end; people leave it out.
std::string punctuated(const scenes::Vocabulary& vocabulary, const std::string& question) {
  const std::vector<int> words = vocabulary.encode(question);
  if (words.empty()) refuse("the question is empty: ask something, such as \"where is the red 7 ?\"");
  const std::string text = vocabulary.decode(words);
  if (text.back() == '?' || text.back() == '.') return text;
  return text + (vocabulary.word(words.front()) == "list" ? " ." : " ?");
}

void run(const Options& options) {
  Eigen::setNbThreads(1);  // matrices this small gain nothing from a second thread, and times are steadier
  const Assistant assistant(options.model);
  const common::Picture picture = common::load_picture(options.picture);
  const std::string question = punctuated(assistant.vocabulary(), options.question);
  const Prompt prompt = assistant.prompt(assistant.look(picture), question);
  const auto [full, pruned] = run_both(assistant, prompt, options.pruning);
  const auto rows = table(assistant.shape(), name_of(options.pruning), full, pruned);
  print_report(question, full.answer, pruned.answer, options.pruning, rows);

  scenes::Figure drawing =
      figure(assistant, prompt, assistant.see(picture), options.pruning, full.answer, pruned.answer);
  drawing.question = question;
  drawing.heads = table_heads;
  drawing.rows = rows;
  scenes::write_figure(options.out, drawing);
  std::printf("\nDrawing      %s\n", options.out.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = read_options(count, arguments);
    if (options.help)
      print_help(options);
    else
      run(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "scenes_demo: %s\n", error.what());
    return 2;
  }
}
