// Runs CUDA kernels on a CPU, so that tests can hold them against the references where there is no GPU.
//
// A block's threads are fibers of one thread of the machine, and a barrier, or an operation of a whole warp, hands
// the processor on. Which thread of a block comes first is a setting (`descending`), and dynamic shared memory starts
// as NaN: a missing barrier or a forgotten write then changes the result. Asynchronous copies happen as late as the
// kernel's own waits allow. It shows that a kernel is right, and nothing of its speed.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define threadIdx (emulate::current().thread)
#define blockIdx (emulate::machine().block)
#define blockDim (emulate::machine().block_size)
#define gridDim (emulate::machine().grid_size)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace emulate {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  int bytes, given;  // what lies behind the given bytes becomes zero
};

struct Fiber {
  enum Status { ready, at_warp, at_block, done } status;
  dim3 thread;
  int lane, warp;
  bool started;
  jmp_buf resume;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is still open
  std::unique_ptr<unsigned char[]> stack;
};

// What the lanes of a warp show each other, twice: a lane may enter the next operation while others still read.
struct Exchange {
  unsigned char bytes[2][kWarp][64];
};

struct Machine {
  dim3 block, block_size, grid_size;
  std::vector<Fiber> fibers;
  std::vector<Exchange> exchanges;
  std::vector<unsigned char> shared;
  unsigned char* shared_base = nullptr;
  Fiber* running = nullptr;
  std::vector<int> turns;  // of a lane: how many operations of the warp it has done
  jmp_buf scheduler;
  std::function<void()> body;
  bool descending = false;
};

inline Machine& machine() {
  static Machine one;
  return one;
}
inline Fiber& current() { return *machine().running; }

inline void wait_as(Fiber::Status status) {
  Fiber& fiber = current();
  fiber.status = status;
  if (!_setjmp(fiber.resume)) _longjmp(machine().scheduler, 1);
}

inline void finish_copies(int groups_left) {
  auto& groups = current().groups;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.given);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.given, 0, copy.bytes - copy.given);
    }
    groups.erase(groups.begin());
  }
}

inline void enter() {
  Machine& m = machine();
  m.body();
  m.running->status = Fiber::done;
  _longjmp(m.scheduler, 1);
}

// Gives the processor to a fiber until it waits or ends.
inline void run(Fiber& fiber) {
  Machine& m = machine();
  m.running = &fiber;
  if (_setjmp(m.scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  constexpr size_t kStack = 256 << 10;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Runs a warp's lanes until all of them stand at a barrier of the block or have ended.
inline void run_warp(Fiber* lanes, int count) {
  Machine& m = machine();
  for (;;) {
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = lanes[m.descending ? count - 1 - i : i];
      if (fiber.status == Fiber::ready) run(fiber);
    }
    int in_warp = 0, elsewhere = 0;
    for (int i = 0; i < count; ++i) (lanes[i].status == Fiber::at_warp ? in_warp : elsewhere)++;
    if (!in_warp) return;
    if (elsewhere) throw std::runtime_error("an operation of a warp was not reached by all its lanes");
    for (int i = 0; i < count; ++i) lanes[i].status = Fiber::ready;
  }
}

inline void run_block() {
  Machine& m = machine();
  const int threads = static_cast<int>(m.fibers.size()), warps = (threads + kWarp - 1) / kWarp;
  std::memset(m.shared.data(), 0xff, m.shared.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.status = Fiber::ready;
    fiber.started = false;
    fiber.groups.assign(1, {});
    fiber.thread = dim3(i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / (m.block_size.x * m.block_size.y));
    fiber.lane = i % kWarp;
    fiber.warp = i / kWarp;
  }
  m.turns.assign(threads, 0);
  for (;;) {
    for (int i = 0; i < warps; ++i) {
      const int warp = m.descending ? warps - 1 - i : i;
      run_warp(&m.fibers[warp * kWarp], std::min(kWarp, threads - warp * kWarp));
    }
    int waiting = 0;
    for (Fiber& fiber : m.fibers)
      if (fiber.status == Fiber::at_block) fiber.status = Fiber::ready, ++waiting;
    if (!waiting) return;
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  Machine& m = machine();
  m.block_size = block;
  m.grid_size = grid;
  m.fibers.resize(block.x * block.y * block.z);
  m.exchanges.resize((m.fibers.size() + kWarp - 1) / kWarp);
  m.shared.resize(shared_bytes + 256);
  m.shared_base = m.shared.data() + (256 - reinterpret_cast<uintptr_t>(m.shared.data()) % 256);
  m.body = [&] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = dim3(x, y, z);
        run_block();
      }
}

// Shows the other lanes a value; returns what all of them showed.
template <class Value>
const unsigned char (*show(const Value& value))[64] {
  static_assert(sizeof(Value) <= 64, "an exchange holds 64 bytes a lane");
  Machine& m = machine();
  Fiber& fiber = current();
  auto& side = m.exchanges[fiber.warp].bytes[m.turns[fiber.warp * kWarp + fiber.lane]++ & 1];
  std::memcpy(side[fiber.lane], &value, sizeof(Value));
  wait_as(Fiber::at_warp);
  return side;
}

template <class Value>
Value shown(const unsigned char (*side)[64], int lane) {
  Value value;
  std::memcpy(&value, side[lane], sizeof(Value));
  return value;
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait_as(emulate::Fiber::at_block); }
inline void __syncwarp(unsigned = ~0u) { emulate::show(0); }

template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return emulate::shown<Value>(emulate::show(value), lane & 31);
}
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulate::shown<Value>(emulate::show(value), emulate::current().lane ^ mask);
}
template <class Value>
Value __shfl_up_sync(unsigned, Value value, int distance) {
  const int lane = emulate::current().lane;
  return emulate::shown<Value>(emulate::show(value), lane < distance ? lane : lane - distance);
}
template <class Value>
Value __shfl_down_sync(unsigned, Value value, int distance) {
  const int lane = emulate::current().lane;
  return emulate::shown<Value>(emulate::show(value), lane + distance > 31 ? lane : lane + distance);
}
inline float atomicAdd(float* at, float value) {
  const float before = *at;
  *at = before + value;
  return before;
}
