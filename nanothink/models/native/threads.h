// Independent pieces of work on several threads, for every source that is compiled where it is used.
//
// The threads are those that PyTorch computes with. Others would have to be started for each call, and would
// have no core to run on: threads of an OpenMP runtime that have nothing to do turn in circles for a while.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Calls a function on each thread of a team: GOMP_parallel of PyTorch's OpenMP runtime. Set by __init__.py; null
// where there is none.
extern "C" {
typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
Team nanothink_team = nullptr;
}

namespace {

// Call piece(0) to piece(n - 1), in no order.
template <class F>
void for_pieces(int64_t n, int64_t n_threads, const F& piece) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next++) < n;) piece(i);
  };
  if (n < 2 || n_threads < 2) return work();
  // Always the whole team: a runtime ends threads that a smaller one leaves over.
  const auto call = [](void* f) { (*static_cast<decltype(work)*>(f))(); };
  if (nanothink_team) return nanothink_team(call, &work, static_cast<unsigned>(n_threads), 0);
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < n_threads && i < n; ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace
