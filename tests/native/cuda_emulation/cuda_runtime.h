// As much of CUDA as csrc/cuda uses, on a CPU: its sources compile with a C++ compiler against this header and run, slowly,
// as they are. What Triton's interpreter is to Triton's kernels, for machines without a GPU.
//
// The blocks of a grid run one after another, a block's threads as coroutines that give way where they wait for each
// other. Half of the launches, drawn at random, run blocks and threads from the last to the first, so that what depends on
// their order, as without a barrier that is needed, gives other results at times; and no block sees what the one before it
// left in shared memory. That proves indices, sums, orders and barriers as far as the tests see them, and that 16-byte
// accesses are aligned. It knows nothing of memory that other blocks see late, of reads past an array's end, of the GPU's
// own exponentials, or of time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A block runs in a thread of its own, so that it finds nothing there of the block before it.
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// An old one, which the driver of a machine is hardly too old for.
#define CUDART_VERSION 12000

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 128 << 10;

enum class State { ready, at_barrier, at_exchange, done };

struct Thread {
  ucontext_t context;  // for the first time; from then on the jump, which asks nothing of the system
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  uint32_t given = 0;    // to the other lanes
  unsigned votes = 0;    // it has cast in this block
  unsigned source = 0;   // the lane whose value is wanted
};

struct Block {
  ucontext_t unused;
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned current = 0, count = 0;
  bool reversed = false, misaligned = false;
  bool vote[3];  // of the one under way; another thread may still read the one before, or cast the next
  std::mt19937 generator;  // the same numbers in every process
  const std::function<void()>* body = nullptr;
};

inline Block& block() {
  static Block it;
  return it;
}

// Of 16 bytes. No exception may leave a thread's own stack, so that run() throws it.
inline void note_access(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) block().misaligned = true;
}

inline void give_way(State state) {
  Block& b = block();
  Thread& own = *b.threads[b.current];
  own.state = state;
  if (_setjmp(own.jump) == 0) _longjmp(b.scheduler, 1);
}

inline void start() {
  Block& b = block();
  (*b.body)();
  b.threads[b.current]->state = State::done;
  _longjmp(b.scheduler, 1);
}

// Lets a thread go on until it gives way.
[[gnu::noinline]] inline void resume(Thread& thread) {
  Block& b = block();
  if (_setjmp(b.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.jump, 1);
  thread.started = true;
  swapcontext(&b.unused, &thread.context);
}

// Runs every thread until it waits or ends; then lets go on whom nobody has to wait for any more.
inline void run_block() {
  Block& b = block();
  while (b.threads.size() < b.count) b.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < b.count; ++i) {
    Thread& thread = *b.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStack};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start, 0);
    thread.state = State::ready;
    thread.started = false;
    thread.votes = 0;
  }
  for (bool& all : b.vote) all = true;
  for (;;) {
    bool ran = false;
    for (unsigned n = 0; n < b.count; ++n) {
      const unsigned i = b.reversed ? b.count - 1 - n : n;
      if (b.threads[i]->state != State::ready) continue;
      b.current = i;
      threadIdx.x = i;
      resume(*b.threads[i]);
      ran = true;
    }
    const auto all = [&](unsigned first, unsigned last, State state) {
      for (unsigned i = first; i < last; ++i) {
        if (b.threads[i]->state != state) return false;
      }
      return true;
    };
    // The lanes of a warp that exchange do so together: CUDA leaves undefined what a lane that is gone would give.
    for (unsigned first = 0; first < b.count; first += kWarp) {
      if (!all(first, first + kWarp, State::at_exchange)) continue;
      uint32_t values[kWarp];
      for (unsigned lane = 0; lane < kWarp; ++lane) values[lane] = b.threads[first + b.threads[first + lane]->source]->given;
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        b.threads[first + lane]->given = values[lane];
        b.threads[first + lane]->state = State::ready;
      }
      ran = true;
    }
    if (all(0, b.count, State::done)) return;
    // A thread that has ended counts as having come to the barrier.
    bool barrier = true;
    for (unsigned i = 0; i < b.count; ++i) {
      barrier = barrier && (b.threads[i]->state == State::at_barrier || b.threads[i]->state == State::done);
    }
    if (barrier) {
      for (unsigned i = 0; i < b.count; ++i) {
        if (b.threads[i]->state == State::at_barrier) b.threads[i]->state = State::ready;
      }
      ran = true;
    }
    if (!ran) throw std::logic_error("a block's threads wait for each other");
  }
}

// How many there were in this process, for tests of what an op costs the host.
inline int64_t& launches() {
  static int64_t count = 0;
  return count;
}

inline void run(unsigned blocks, int threads, const std::function<void()>& body) {
  ++launches();
  Block& b = block();
  if (threads % kWarp != 0) throw std::logic_error("a block is whole warps");
  b.body = &body;
  b.count = static_cast<unsigned>(threads);
  gridDim.x = blocks;
  blockDim.x = b.count;
  b.reversed = b.generator() & 1;
  for (unsigned n = 0; n < blocks; ++n) {
    blockIdx.x = b.reversed ? blocks - 1 - n : n;
    std::async(std::launch::async, run_block).get();
  }
  if (b.misaligned) throw std::logic_error("16 bytes at an address that is no multiple of 16");
}

inline uint32_t exchange(uint32_t value, unsigned source) {
  Thread& own = *block().threads[block().current];
  own.given = value;
  own.source = source;
  give_way(State::at_exchange);
  return own.given;
}

}  // namespace emulation

inline void __syncthreads() { emulation::give_way(emulation::State::at_barrier); }
inline int __syncthreads_and(int yes) {
  emulation::Block& b = emulation::block();
  const unsigned number = b.threads[b.current]->votes++;
  if (!yes) b.vote[number % 3] = false;
  __syncthreads();
  b.vote[(number + 2) % 3] = true;
  return b.vote[number % 3];
}
inline void __threadfence() {}

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  return emulation::exchange(value, lane < distance ? lane : lane - distance);
}
inline uint32_t __shfl_down_sync(unsigned, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  return emulation::exchange(value, lane + distance < emulation::kWarp ? lane + distance : lane);
}
inline uint32_t __shfl_sync(unsigned, uint32_t value, unsigned source, unsigned width) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  return emulation::exchange(value, lane / width * width + source % width);
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, unsigned mask) {
  return emulation::exchange(value, threadIdx.x % emulation::kWarp ^ mask);
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at += value;
  return before;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

using std::isfinite;
