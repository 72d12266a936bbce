#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <fastv/version.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../common/canvas.hpp"

namespace llava {

namespace {

using common::format;

double mebibytes(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

double flops_ratio(const Halves& halves, const Run& run, const Run& whole) {
  return fastv::prefill_flops(halves.cost_shape(), run.plan) / fastv::prefill_flops(halves.cost_shape(), whole.plan);
}

// Equal tokens among the first 32 of both.
std::pair<std::size_t, std::size_t> agreement(const Run& a, const Run& b) {
  const std::size_t n = std::min<std::size_t>(32, std::max(a.tokens.size(), b.tokens.size()));
  std::size_t equal = 0;
  for (std::size_t i = 0; i < n; ++i)
    equal += i < a.tokens.size() && i < b.tokens.size() && a.tokens[i] == b.tokens[i] ? 1u : 0u;
  return {equal, n};
}

}  // namespace

std::string tokens_per_layer(const fastv::Plan& plan) {
  std::string text;
  for (std::size_t begin = 0; begin < plan.layers;) {
    std::size_t end = begin + 1;
    while (end < plan.layers && plan.tokens_in_layer(end) == plan.tokens_in_layer(begin)) ++end;
    text += (text.empty() ? "layer" : ", layer") + std::string(end - begin > 1 ? "s " : " ") + std::to_string(begin) +
            (end - begin > 1 ? "-" + std::to_string(end - 1) : "") + ": " + std::to_string(plan.tokens_in_layer(begin));
    begin = end;
  }
  return text;
}

std::string summary(const Run& run) {
  return "[" + tokens_per_layer(run.plan) + format("; prefill %.1f ms", run.prefill.seconds * 1e3) +
         format("; decode %.1f tokens/s", run.tokens_per_second()) +
         format("; KV cache %.2f MiB]\n", mebibytes(run.cache_bytes));
}

std::string comparison(const Halves& halves, const Run& whole, const Run& pruned) {
  std::string text;
  for (const Run* run : {&whole, &pruned}) text += run->name + ": " + run->text + "\n\n";
  const auto row = [&](const char* name, const std::string& a, const std::string& b) {
    char line[256];
    std::snprintf(line, sizeof(line), "%-22s %-28s %s\n", name, a.c_str(), b.c_str());
    text += line;
  };
  row("", whole.name, pruned.name);
  row("tokens", tokens_per_layer(whole.plan), tokens_per_layer(pruned.plan));
  row("prefill", format("%.1f ms", whole.prefill.seconds * 1e3),
      format("%.1f ms", pruned.prefill.seconds * 1e3) +
          format(" (%.1f%%)", 100 * pruned.prefill.seconds / whole.prefill.seconds));
  row("prefill FLOPs", "100%", format("%.1f%%", 100 * flops_ratio(halves, pruned, whole)));
  row("decode", format("%.1f tokens/s", whole.tokens_per_second()),
      format("%.1f tokens/s", pruned.tokens_per_second()));
  row("KV cache", format("%.2f MiB", mebibytes(whole.cache_bytes)), format("%.2f MiB", mebibytes(pruned.cache_bytes)));
  const auto [equal, n] = agreement(whole, pruned);
  row("same tokens", "", std::to_string(equal) + " of the first " + std::to_string(n));
  return text;
}

void write_json(const std::string& path, const Options& options, const Halves& halves, const Prompt& prompt,
                const std::vector<Run>& runs) {
  nlohmann::json json;
  const auto version = [](int major, int minor, int patch) {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  };
  json["fastv"] = version(FASTV_VERSION_MAJOR, FASTV_VERSION_MINOR, FASTV_VERSION_PATCH);
  const fastv::ModelShape shape = halves.cost_shape();
  json["model"] = {{"file", options.model},
                   {"architecture", halves.architecture()},
                   {"filtering_layer", halves.filtering_layer()},
                   {"filtering_layers", halves.facts().filtering_layers},
                   {"layers", shape.layers},
                   {"hidden", shape.hidden},
                   {"heads", shape.heads},
                   {"kv_heads", shape.kv_heads},
                   {"intermediate", shape.intermediate},
                   {"vocabulary", shape.vocabulary}};
  json["prompt"] = {{"text", options.prompt}, {"tokens", prompt.tokens()}, {"visual", nlohmann::json::array()}};
  for (const fastv::TokenSpan& span : prompt.visual())
    json["prompt"]["visual"].push_back({{"first", span.first}, {"count", span.count}, {"columns", span.columns}});
  for (const Run& run : runs) {
    nlohmann::json tokens = nlohmann::json::array();
    for (std::size_t i = 0; i < run.plan.layers; ++i) tokens.push_back(run.plan.tokens_in_layer(i));
    json["runs"].push_back({{"name", run.name},
                            {"answer", run.text},
                            {"tokens", run.tokens},
                            {"tokens_in_layer", tokens},
                            {"kept", run.prefill.kept},
                            {"scores", run.prefill.scores},
                            {"prefill_ms", run.prefill.seconds * 1e3},
                            {"prefill_flops", fastv::prefill_flops(shape, run.plan)},
                            {"decode_tokens_per_s", run.tokens_per_second()},
                            {"kv_bytes", run.cache_bytes}});
  }
  std::ofstream out(path);
  out << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
  if (!out) throw std::runtime_error("cannot write " + path);
}

void write_overlay(const std::string& path, const std::vector<std::string>& pictures,
                   const std::vector<fastv::TokenSpan>& visual, const std::vector<fastv::Index>& kept, bool padded,
                   std::size_t first_patch) {
  using namespace common;
  constexpr double height = 480, gap = 16, caption = 28;
  struct Panel {
    Picture picture;
    Box box;
    std::vector<fastv::TokenSpan> tiles;
  };
  std::vector<Panel> panels;
  double x = gap;
  std::size_t next = 0;
  for (std::size_t i = 0; i < pictures.size() && next < visual.size(); ++i) {
    Picture picture = load_picture(pictures[i]);
    if (padded) picture = pad_to_square(picture, {0.48145466f, 0.4578275f, 0.40821073f});  // CLIP's mean colour
    const double width = height * picture.width / picture.height;
    panels.push_back({std::move(picture), {x, gap, width, height}, {visual[next++]}});
    while (next < visual.size() && visual[next].continues) panels.back().tiles.push_back(visual[next++]);
    x += width + gap;
  }
  write_drawing(path, x, height + 2 * gap + caption, [&](Canvas& canvas) {
    for (const Panel& panel : panels) {
      canvas.picture(panel.picture, panel.box);
      const bool is_grid = panel.tiles.size() == 1 && panel.tiles[0].columns != 0;
      std::size_t all = 0, count = 0;
      for (const fastv::TokenSpan& tile : panel.tiles) {
        std::vector<bool> stays(tile.count, false);
        for (const fastv::Index index : kept)
          if (index >= tile.first && index < tile.first + tile.count) {
            const std::size_t patch = index - tile.first + first_patch;
            if (patch < stays.size()) stays[patch] = true;
            ++count;
          }
        all += tile.count;
        const std::size_t columns = tile.columns, rows = is_grid ? tile.count / columns : 0;
        for (std::size_t i = 0; rows > 0 && i < stays.size(); ++i) {
          const double w = panel.box.width / static_cast<double>(columns),
                       h = panel.box.height / static_cast<double>(rows);
          const Box cell{panel.box.x + w * static_cast<double>(i % columns),
                         panel.box.y + h * static_cast<double>(i / columns), w, h};
          if (stays[i])
            canvas.outline(cell, ink::vermilion, 1.2);
          else
            canvas.fill(cell, {1, 1, 1, 0.75});
        }
      }
      const std::string why = is_grid ? ""
                              : panel.tiles.size() > 1
                                  ? "; they are of " + std::to_string(panel.tiles.size()) + " tiles"
                                  : "; they are no grid";
      canvas.text(std::to_string(count) + " of " + std::to_string(all) + " visual tokens kept" + why, panel.box.x,
                  panel.box.bottom() + 20, 14, ink::grey);
    }
  });
}

}  // namespace llava
