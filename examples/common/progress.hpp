// A progress bar on standard error, with the time that is left. Where standard error is no terminal it prints a line
// every tenth of the way.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <mutex>
#include <string>

namespace common {

class Progress {
 public:
  Progress(std::string label, std::size_t total) : label_(std::move(label)), total_(total) {}
  ~Progress() {
    if (terminal_) std::fprintf(stderr, "\r\033[K");
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // One more is done. Threads may call it together.
  void step() {
    const std::lock_guard<std::mutex> lock(mutex_);
    show(done_ + 1);
  }
  // That share of the total is done, 0 to 1.
  void reach(double share) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto done = static_cast<std::size_t>(share * static_cast<double>(total_));
    if (done > done_) show(done);
  }

 private:
  void show(std::size_t done) {
    done_ = done;
    const std::size_t tenth = 10 * done_ / total_;
    if (terminal_ ? false : tenth == printed_) return;
    printed_ = tenth;
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    if (!terminal_ && spent < 2) return;  // over before anybody would wonder
    const double left = spent * static_cast<double>(total_ - done_) / static_cast<double>(done_);
    const std::string bar(20 * done_ / total_, '#');
    std::fprintf(stderr, "%s%s [%-20s] %zu of %zu, %.0f s left%s", terminal_ ? "\r\033[K" : "", label_.c_str(),
                 bar.c_str(), done_, total_, left, terminal_ ? "" : "\n");
  }

  std::string label_;
  std::size_t total_, done_ = 0, printed_ = 0;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::mutex mutex_;
};

}  // namespace common
