// A stand-in for CUDA that runs the same kernels on a CPU, to test their arithmetic and indices.
//
// Blocks run one after another. The threads of a block are fibers that take turns at barriers and
// shuffles, so nothing races and nothing is fast: this shows what a kernel computes where its
// threads cannot disturb each other, not that they cannot.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace neobert::on_host {

constexpr size_t STACK = 64 << 10;
constexpr unsigned WARP = 32;

struct Group {  // of threads that meet: a block or a warp
  unsigned alive = 0, arrived = 0, round = 0;
};

struct Fiber {
  ucontext_t context;
  dim3 index;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool ended = true;
};

struct Block {
  std::mutex busy;
  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  std::vector<float> slots;
  Group all;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned running = 0;
  bool moved = false;
};

inline Block block;

inline void release(Group& group) {
  if (group.alive && group.arrived < group.alive) return;
  group.arrived = 0;
  ++group.round;
  block.moved = true;
}

inline void meet(Group& group) {
  const unsigned round = group.round, me = block.running;
  ++group.arrived;
  release(group);
  while (group.round == round) swapcontext(&block.fibers[me].context, &block.scheduler);
}

inline void begin_fiber() {
  block.body();
  Fiber& fiber = block.fibers[block.running];
  fiber.ended = block.moved = true;
  for (Group* group : {&block.all, &block.warps[block.running / WARP]}) {
    --group->alive;
    if (group->arrived) release(*group);
  }
}

inline void run_block(unsigned threads) {
  block.warps.assign((threads + WARP - 1) / WARP, {});
  block.slots.resize(threads);
  block.all = {threads};
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    ++block.warps[i / WARP].alive;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, begin_fiber, 0);
  }
  for (unsigned left = threads; left;) {
    block.moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.fibers[i].ended) continue;
      block.running = i;
      threadIdx = block.fibers[i].index;
      swapcontext(&block.scheduler, &block.fibers[i].context);
      left -= block.fibers[i].ended;
    }
    if (!block.moved) {
      std::fputs("a barrier that not all threads reach\n", stderr);
      std::abort();
    }
  }
}

template <typename Kernel, typename... Arguments>
int launch(Kernel kernel, dim3 grid, dim3 threads, const Arguments&... arguments) {
  std::lock_guard<std::mutex> alone(block.busy);
  const unsigned count = threads.x * threads.y;
  while (block.fibers.size() < count) block.fibers.emplace_back();
  block.body = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = threads;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(count);
    }
  }
  return 0;
}

}  // namespace neobert::on_host

#define NEOBERT_UNBRACED(...) __VA_ARGS__
#define NEOBERT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), neobert::on_host::launch(NEOBERT_UNBRACED kernel, (grid), (block), __VA_ARGS__))

inline void __syncthreads() { neobert::on_host::meet(neobert::on_host::block.all); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace neobert::on_host;
  const unsigned me = block.running;
  Group& warp = block.warps[me / WARP];
  block.slots[me] = value;
  meet(warp);
  const float other = block.slots[me ^ mask];
  meet(warp);
  return other;
}
