// Runs a launch on the host. The blocks that must be resident together (one, a cluster, or the whole grid of a
// cooperative launch) have one fiber a thread, the others follow one after the other. A fiber runs until it waits;
// then the ready fiber that comes first runs:
//   seed 0     the lowest thread, so that each warp gets as far ahead of the next ones as barriers let it;
//   seed 1     the highest;
//   seed 2...  pseudo-random priorities of warps, drawn anew at each barrier, and of lanes.
// Memory lies between pages that fault: against the one behind it with even seeds, against the one before it with odd
// ones; what is left of its own pages holds 0xFF, which is checked afterwards. So does fresh memory: a NaN in every
// type. An error ends the launch by a jump from the fiber, or from the handler of its signal, back into `run`.
#include "shim.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <list>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fiber_context.h"
#include "guarded_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace consequentialism::cuda {
namespace shim {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedAlignment = 128;
constexpr size_t kMaxSharedBytes = 232448;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16, kMaxGridYz = 65535;
constexpr unsigned kResidentBlocks = 132;  // the processors of an H100, one block each

struct Copy {
  void* shared;
  const void* global;
  int valid_bytes;
};

struct Block;
struct Warp;

struct Fiber {
  Context context;
  uint3 thread;
  Block* block;
  Warp* warp;
  unsigned lane;
  unsigned index;  // among the resident threads
  bool exited;

  // What it waits in, and where; for a warp collective also with whom, and for a change of memory of what.
  const char* waits_in;
  Where where;
  uint32_t mask;
  void* payload;
  const unsigned* address;
  unsigned before;

  std::vector<Copy> copies;           // uncommitted ones at the end
  std::vector<size_t> copies_groups;  // of committed groups, the number of copies up to its end
};

struct Warp {
  Fiber* first;
  uint32_t live, waiting;  // lanes
  unsigned index, epoch;
};

struct Cluster {
  std::vector<Fiber*> waiting;
  unsigned live = 0, size = 1;
  Block* blocks = nullptr;
};

struct Block {
  std::vector<Fiber*> waiting;
  unsigned live, rank;
  uint3 index;
  bool started;
  Cluster* cluster;
  Region* shared;
};

using Ready = std::pair<uint64_t, Fiber*>;  // the least runs first

struct State {
  std::mutex lock;
  std::string message;
  uint64_t seed = 0;
  double seconds_allowed = 60;
  uint64_t launches = 0, shared_bytes = 0, switches = 0;

  std::list<Region> buffers;
  std::deque<Region> shared;
  Region stacks;
  size_t stacks_ready = 0;

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::vector<Ready> ready;
  std::vector<Fiber*> polling;  // wait for a change of memory
  Fiber* current = nullptr;
  unsigned epoch = 0;  // counts what gives warps new priorities
  Context scheduler;

  void (*invoke)(void*) = nullptr;
  void* context = nullptr;

  bool inside = false;  // a fiber runs: its faults are ours
  pthread_t thread;
  jmp_buf back;
  cudaError_t error = cudaSuccess;
  int fault = 0;
  bool fault_writes = false, fault_known = false;
  const unsigned char *fault_address = nullptr, *fault_instruction = nullptr;
};

State state;

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

std::string describe(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string describe(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

std::string describe(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return describe("%s:%u", slash ? slash + 1 : where.file_name(), static_cast<unsigned>(where.line()));
}

std::string describe(const uint3& index) {
  return describe("(%u, %u, %u)", index.x, index.y, index.z);
}

std::string describe(const Fiber& fiber) {
  return "block " + describe(fiber.block->index) + " thread " + describe(fiber.thread);
}

// "+0x..." from the start of this library, which the Python side hands to addr2line.
std::string describe_code(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return describe("%p", address);
  return describe(
      "+0x%zx", static_cast<size_t>(static_cast<const char*>(address) - static_cast<char*>(info.dli_fbase)));
}

[[noreturn]] void fail_with(cudaError_t error, const std::string& what) {
  state.error = error;
  state.message = what;
  if (state.current != nullptr) state.message += ", " + describe(*state.current);
  state.inside = false;
  _longjmp(state.back, 1);
}

void make_ready(Fiber& fiber) {
  uint64_t key = fiber.index;
  if (state.seed == 1) {
    key = ~key;
  } else if (state.seed > 1) {
    const uint64_t warp = mix(state.seed ^ mix(uint64_t{fiber.warp->index} << 32 | fiber.warp->epoch));
    key = warp >> 32 << 32 | mix(warp + fiber.lane) >> 32;
  }
  state.ready.emplace_back(key, &fiber);
  std::push_heap(state.ready.begin(), state.ready.end(), std::greater<Ready>());
}

void activate(Fiber& fiber) {
  state.current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  if (!fiber.block->started) {
    fiber.block->started = true;
    fiber.block->shared->protect(PROT_READ | PROT_WRITE);
  }
}

// Whoever comes next; null if nobody can go on.
Fiber* next() {
  if (state.ready.empty()) {
    std::erase_if(state.polling, [](Fiber* fiber) {
      const bool changed = ((*fiber->address ^ fiber->before) & fiber->mask) != 0;
      if (changed) make_ready(*fiber);
      return changed;
    });
    if (state.ready.empty()) return nullptr;
  }
  std::pop_heap(state.ready.begin(), state.ready.end(), std::greater<Ready>());
  Fiber* fiber = state.ready.back().second;
  state.ready.pop_back();
  return fiber;
}

// Goes on with whoever comes next, which may be the running thread itself.
void suspend() {
  Fiber& self = *state.current;
  Fiber* const fiber = next();
  if (fiber != &self) {
    ++state.switches;
    if (fiber != nullptr) activate(*fiber);
    Context::exchange(self.context, fiber == nullptr ? state.scheduler : fiber->context);
  }
  self.waits_in = nullptr;
}

void release(std::vector<Fiber*>& waiting) {
  ++state.epoch;
  for (Fiber* fiber : waiting) {
    fiber->warp->epoch = state.epoch;
    make_ready(*fiber);
  }
  waiting.clear();
}

// The running thread waits until `live` threads do.
void arrive(std::vector<Fiber*>& waiting, unsigned live, const char* name, const Where& where) {
  Fiber& self = *state.current;
  if (!waiting.empty()) {
    const Fiber& other = *waiting.front();
    if (other.where.line() != where.line() || other.where.column() != where.column() ||
        strcmp(other.where.file_name(), where.file_name()) != 0) {
      fail_with(
          cudaErrorLaunchFailure, "divergent barrier: " + std::string(name) + " at " + describe(where) +
                                      " meets the one at " + describe(other.where) + " of " + describe(other));
    }
  }
  waiting.push_back(&self);
  self.waits_in = name;
  self.where = where;
  if (waiting.size() == live) release(waiting);
  suspend();
}

bool close_block(Block& block) {
  ptrdiff_t offset;
  if (!block.shared->spoilt(&offset)) return true;
  state.error = cudaErrorIllegalAddress;
  state.message = describe("write at byte %td of the %zu of shared memory, block ", offset, block.shared->bytes) +
                  describe(block.index);
  return false;
}

void exit_thread() {
  Fiber& self = *state.current;
  Block& block = *self.block;
  self.exited = true;
  self.warp->live &= ~(1u << self.lane);
  for (uint32_t lanes = self.warp->waiting; lanes != 0; lanes &= lanes - 1) {
    const Fiber& other = self.warp->first[__builtin_ctz(lanes)];
    if ((other.mask >> self.lane & 1) != 0) {
      fail_with(
          cudaErrorLaunchFailure, describe("thread exits, but is named in the mask 0x%08x of ", other.mask) +
                                      other.waits_in + " at " + describe(other.where) + " of " + describe(other));
    }
  }
  --block.live;
  --block.cluster->live;
  if (block.live == 0) {
    if (!close_block(block)) fail_with(state.error, state.message);
    if (block.cluster->size > 1) block.shared->protect(PROT_NONE);
  }
  if (block.live != 0 && block.waiting.size() == block.live) release(block.waiting);
  if (block.cluster->live != 0 && block.cluster->waiting.size() == block.cluster->live) release(block.cluster->waiting);
  suspend();
  abort();
}

void run_thread() {
  state.invoke(state.context);
  exit_thread();
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
struct sigaction previous_actions[std::size(kSignals)];
alignas(16) unsigned char signal_stack[64 << 10];

void on_signal(int signal, siginfo_t* info, void* context) {
  const bool ours = state.inside && pthread_equal(pthread_self(), state.thread);
  if (ours) {
    state.fault = signal;
    state.fault_address = static_cast<const unsigned char*>(info->si_addr);
    state.fault_known = info->si_code > 0 && info->si_code != SI_KERNEL;
#ifdef __x86_64__
    const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
    state.fault_instruction = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
    state.fault_writes = (registers[REG_ERR] & 2) != 0;
#else
    (void)context;
    state.fault_instruction = nullptr;
#endif
    state.inside = false;
    _longjmp(state.back, 1);
  }
  if (signal == SIGVTALRM && info->si_code == SI_KERNEL) {
    if (state.inside) pthread_kill(state.thread, signal);
    return;
  }
  const auto which = static_cast<size_t>(std::find(std::begin(kSignals), std::end(kSignals), signal) - kSignals);
  const struct sigaction& previous = previous_actions[which];
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
    sigaction(signal, &previous, nullptr);  // and the same instruction faults again
  } else {
    previous.sa_handler(signal);
  }
}

class SignalGuard {
 public:
  SignalGuard() {
    stack_t stack{};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
    set_timer(state.seconds_allowed);
  }
  ~SignalGuard() {
    set_timer(0);
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  static void set_timer(double seconds) {
    itimerval timer{};
    timer.it_value.tv_sec = static_cast<time_t>(seconds);
    timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - floor(seconds)) * 1e6);
    if (seconds > 0) timer.it_interval.tv_sec = 1;  // again, in case it finds no fiber running
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
  stack_t previous_stack_;
};

bool describe_address(const Region& region, const std::string& name, const unsigned char* address, std::string* text) {
  if (region.map == nullptr || address < region.map || address >= region.map + region.map_bytes) return false;
  *text = describe("at byte %td of the %zu of ", address - region.base, region.bytes) + name;
  return true;
}

std::string describe_address(const unsigned char* address) {
  std::string text;
  for (const Region& region : state.buffers) {
    if (describe_address(region, "'" + region.name + "'", address, &text)) return text;
  }
  for (size_t i = 0; i < state.shared.size(); ++i) {
    std::string name = "shared memory";
    if (i < state.blocks.size() && &state.blocks[i] != state.current->block) {
      name += " of block " + describe(state.blocks[i].index);
      if (!state.blocks[i].started) name += ", which does not run yet";
      if (state.blocks[i].live == 0) name += ", which has exited";
    }
    if (describe_address(state.shared[i], name, address, &text)) return text;
  }
  if (describe_address(state.stacks, "", address, &text)) return "on the stack, which has only 60 KB";
  return describe("at %p, in no buffer", static_cast<const void*>(address));
}

void explain_fault() {
  std::string what;
  state.error = cudaErrorIllegalAddress;
  if (state.fault == SIGVTALRM) {
    state.error = cudaErrorLaunchTimeout;
    what = describe("no end after %g s of processor time", state.seconds_allowed);
  } else if (state.fault == SIGILL) {
    state.error = cudaErrorMisalignedAddress;
    what = "undefined behaviour: a misaligned address, an index beyond its array, a shift or an overflow";
  } else if (state.fault == SIGFPE) {
    state.error = cudaErrorLaunchFailure;
    what = "division by zero";
  } else if (!state.fault_known) {
    what = "misaligned or impossible address";
  } else {
#ifdef __x86_64__
    what = state.fault_writes ? "write " : "read ";
#else
    what = "access ";
#endif
    what += describe_address(state.fault_address);
  }
  if (state.fault_instruction != nullptr) what += " at " + describe_code(state.fault_instruction);
  state.message = what + ", " + describe(*state.current);
}

void explain_deadlock() {
  state.error = cudaErrorLaunchFailure;
  std::vector<const Fiber*> examples;
  size_t waiting = 0;
  for (const Fiber& fiber : state.fibers) {
    if (fiber.exited) continue;
    ++waiting;
    const bool known = std::any_of(examples.begin(), examples.end(), [&](const Fiber* other) {
      return other->where.line() == fiber.where.line() && strcmp(other->waits_in, fiber.waits_in) == 0;
    });
    if (!known && examples.size() < 4) examples.push_back(&fiber);
  }
  state.message = describe("deadlock: %zu of %zu threads wait", waiting, state.fibers.size());
  for (const Fiber* fiber : examples) {
    state.message += "; " + describe(*fiber) + " in " + fiber->waits_in + " at " + describe(fiber->where);
  }
}

// The blocks of clusters[first, first + count) of the grid, together.
void set_up(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, const uint64_t* chosen, size_t count) {
  const unsigned threads = block.x * block.y * block.z, warps = (threads + 31) / 32;
  const size_t blocks = count * cluster;
  while (state.shared.size() < blocks) state.shared.emplace_back().reserve(kMaxSharedBytes);
  if (state.stacks.map == nullptr) state.stacks.reserve(size_t{kResidentBlocks} * kMaxThreads * kStackBytes);
  state.fibers.resize(blocks * threads);
  state.warps.resize(blocks * warps);
  state.blocks.resize(blocks);
  state.clusters.resize(count);
  state.ready.clear();
  state.polling.clear();
  state.stacks.open = state.stacks.base = state.stacks.map + kGuardBytes;
  for (; state.stacks_ready < blocks * threads; ++state.stacks_ready) {
    unsigned char* stack = state.stacks.open + state.stacks_ready * kStackBytes;
    mprotect(stack + page_bytes(), kStackBytes - page_bytes(), PROT_READ | PROT_WRITE);
  }
  for (size_t c = 0; c < count; ++c) {
    Cluster& group = state.clusters[c];
    group.waiting.clear();
    group.live = cluster * threads;
    group.size = cluster;
    group.blocks = &state.blocks[c * cluster];
  }
  for (size_t b = 0; b < blocks; ++b) {
    const uint64_t linear = chosen[b / cluster] * cluster + b % cluster;
    Block& own = state.blocks[b];
    own.waiting.clear();
    own.live = threads;
    own.rank = static_cast<unsigned>(b % cluster);
    own.index = {
        static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
        static_cast<unsigned>(linear / grid.x / grid.y)};
    own.cluster = &state.clusters[b / cluster];
    own.shared = &state.shared[b];
    own.shared->protect(PROT_READ | PROT_WRITE);
    own.shared->place(shared_bytes, kSharedAlignment, state.seed % 2 == 1);
    own.started = cluster == 1;
    if (!own.started) own.shared->protect(PROT_NONE);  // until it runs, as other blocks of the cluster must not use it
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned lanes = std::min(32u, threads - 32 * w);
      state.warps[b * warps + w] = {
          &state.fibers[b * threads + 32 * w], 0xFFFFFFFFu >> (32 - lanes), 0, static_cast<unsigned>(b * warps + w),
          ++state.epoch};
    }
    for (unsigned t = 0; t < threads; ++t) {
      const size_t index = b * threads + t;
      Fiber& fiber = state.fibers[index];
      fiber.thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      fiber.block = &own;
      fiber.warp = &state.warps[b * warps + t / 32];
      fiber.lane = t % 32;
      fiber.index = static_cast<unsigned>(index);
      fiber.exited = false;
      fiber.waits_in = nullptr;
      fiber.copies.clear();
      fiber.copies_groups.clear();
      // Stacks of one size would all have their tops in the same sets of the cache.
      const size_t colour = index % 32 * 64;
      fiber.context.prepare(
          state.stacks.open + index * kStackBytes + page_bytes(), kStackBytes - page_bytes() - colour, run_thread);
    }
  }
  for (Fiber& fiber : state.fibers) make_ready(fiber);
}

// Until no fiber can go on; false if one of them jumped out.
__attribute__((noinline)) bool run_fibers() {
  if (_setjmp(state.back) != 0) return false;
  activate(*next());
  state.inside = true;
  Context::exchange(state.scheduler, state.current->context);
  state.inside = false;
  return true;
}

bool run_resident() {
  if (run_fibers()) {
    const auto exited = [](const Fiber& fiber) { return fiber.exited; };
    if (std::all_of(state.fibers.begin(), state.fibers.end(), exited)) return true;
    explain_deadlock();
  } else if (state.fault != 0) {
    explain_fault();
  }
  return false;
}

bool buffers_whole() {
  for (const Region& region : state.buffers) {
    ptrdiff_t offset;
    if (region.spoilt(&offset)) {
      state.error = cudaErrorIllegalAddress;
      state.message = describe("write at byte %td of the %zu of '%s'", offset, region.bytes, region.name.c_str());
      return false;
    }
  }
  return true;
}

}  // namespace

void fail(cudaError_t error, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_with(error, text);
}

cudaError_t run(
    const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative,
    void (*invoke)(void*), void* context) {
  const std::lock_guard guard(state.lock);
  state.error = cudaSuccess;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const std::string name = "kernel " + describe_code(kernel) + ": ";
  const auto refused = [&](cudaError_t error, const char* what) {
    state.message = name + what;
    return state.error = error;
  };
  if (threads == 0) return refused(cudaErrorInvalidValue, "an empty block");
  if (threads > kMaxThreads || block.z > 64) return refused(cudaErrorInvalidValue, "too many threads in a block");
  if (shared_bytes > kMaxSharedBytes) return refused(cudaErrorInvalidValue, "too much shared memory");
  if (cluster == 0 || cluster > kMaxCluster) return refused(cudaErrorInvalidValue, "no such cluster");
  if (grid.x % cluster != 0) return refused(cudaErrorInvalidValue, "a grid that is no multiple of the cluster");
  if (grid.x > 0x7FFFFFFFu || grid.y > kMaxGridYz || grid.z > kMaxGridYz) {
    return refused(cudaErrorInvalidValue, "too large a grid");
  }
  if (cooperative && blocks > kResidentBlocks) {
    return refused(cudaErrorCooperativeLaunchTooLarge, "more blocks than can be resident");
  }

  ++state.launches;
  state.shared_bytes = std::max<uint64_t>(state.shared_bytes, shared_bytes);
  blockDim = block;
  gridDim = grid;
  state.invoke = invoke;
  state.context = context;
  state.thread = pthread_self();
  state.fault = 0;
  state.epoch = 0;
  state.message.clear();

  std::vector<uint64_t> order(blocks / cluster);
  std::iota(order.begin(), order.end(), uint64_t{0});
  const size_t together = cooperative ? order.size() : 1;
  if (!cooperative && state.seed == 1) std::reverse(order.begin(), order.end());
  for (size_t i = order.size(); !cooperative && state.seed > 1 && i > 1; --i) {
    std::swap(order[i - 1], order[mix(state.seed ^ mix(i)) % i]);
  }
  bool right = true;
  {
    const SignalGuard signals;
    for (size_t first = 0; right && first < order.size(); first += together) {
      set_up(grid, block, shared_bytes, cluster, &order[first], together);
      right = run_resident();
    }
  }
  if (right) right = buffers_whole();
  state.current = nullptr;
  if (!right) state.message = name + state.message;
  return state.error;
}

unsigned resident_blocks() {
  return kResidentBlocks;
}

unsigned char* shared_memory() {
  return state.current->block->shared->base;
}

unsigned lane() {
  return state.current->lane;
}

void block_barrier(const Where& where) {
  Block& block = *state.current->block;
  arrive(block.waiting, block.live, "__syncthreads", where);
}

void wait_for_change(const char* name, const unsigned* address, unsigned mask, unsigned before, Where where) {
  if (((*address ^ before) & mask) != 0) return;
  Fiber& self = *state.current;
  self.waits_in = name;
  self.where = where;
  self.address = address;
  self.mask = mask;
  self.before = before;
  state.polling.push_back(&self);
  suspend();
}

void warp_collective(
    const char* name, uint32_t mask, bool aligned, void* payload, Combine combine, const Where& where) {
  Fiber& self = *state.current;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  if ((mask & bit) == 0 || (mask & ~warp.live) != 0) {
    fail(
        cudaErrorLaunchFailure, "%s at %s: the mask 0x%08x %s", name, describe(where).c_str(), mask,
        (mask & bit) == 0 ? "lacks the caller" : "names threads that have exited or never were");
  }
  uint32_t arrived = bit;
  for (uint32_t others = warp.waiting & mask; others != 0; others &= others - 1) {
    const int lane = __builtin_ctz(others);
    const Fiber& other = warp.first[lane];
    if ((other.mask & bit) == 0) continue;  // it is busy with others
    const bool same = other.mask == mask && (other.waits_in == name || strcmp(other.waits_in, name) == 0) &&
                      (!aligned || other.where.line() == where.line());
    if (!same) {
      fail(
          cudaErrorLaunchFailure, "%s(0x%08x) at %s meets %s(0x%08x) at %s of %s", name, mask, describe(where).c_str(),
          other.waits_in, other.mask, describe(other.where).c_str(), describe(other).c_str());
    }
    arrived |= 1u << lane;
  }
  self.waits_in = name;
  self.where = where;
  self.mask = mask;
  self.payload = payload;
  warp.waiting |= bit;
  if (arrived == mask) {
    void* payloads[32] = {};
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      payloads[lane] = warp.first[lane].payload;
      make_ready(warp.first[lane]);
    }
    combine(payloads);
    warp.waiting &= ~mask;
  }
  suspend();
}

void shuffle(const char* name, uint32_t mask, ShuffleCall* call, const Where& where) {
  const auto combine = [](void* const* payloads) {
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] == nullptr) continue;
      ShuffleCall& call = *static_cast<ShuffleCall*>(payloads[lane]);
      // The value of a lane that takes no part is undefined.
      const auto* source = static_cast<const ShuffleCall*>(payloads[call.source]);
      call.result = source == nullptr ? ~uint64_t{0} : source->value;
    }
  };
  warp_collective(name, mask, false, call, combine, where);
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, const Where& where) {
  uint64_t payload = predicate;
  const auto combine = [](void* const* payloads) {
    uint64_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] != nullptr) votes |= *static_cast<const uint64_t*>(payloads[lane]) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] != nullptr) *static_cast<uint64_t*>(payloads[lane]) = votes;
    }
  };
  warp_collective(name, mask, false, &payload, combine, where);
  return static_cast<uint32_t>(payload);
}

void check_shared(const char* name, const void* address, size_t bytes, size_t alignment) {
  const Region& shared = *state.current->block->shared;
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - shared.base;
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(cudaErrorMisalignedAddress, "%s: byte %td of shared memory is misaligned", name, offset);
  }
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared.bytes) {
    fail(
        cudaErrorIllegalAddress, "%s: %zu bytes at byte %td of the %zu of shared memory", name, bytes, offset,
        shared.bytes);
  }
}

void copy_async(void* shared, const void* global, int valid_bytes) {
  check_shared("copy_async_16", shared, 16, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(
        cudaErrorMisalignedAddress, "copy_async_16: %s is misaligned",
        describe_address(static_cast<const unsigned char*>(global)).c_str());
  }
  if (valid_bytes < 0 || valid_bytes > 16) fail(cudaErrorInvalidValue, "copy_async_16 of %d bytes", valid_bytes);
  memset(shared, kFreshByte, 16);  // the chip may write from now on: a reader that is not done yet shows
  state.current->copies.push_back({shared, global, valid_bytes});
}

void copy_async_commit() {
  state.current->copies_groups.push_back(state.current->copies.size());
}

void copy_async_wait(unsigned pending) {
  Fiber& self = *state.current;
  if (self.copies_groups.size() <= pending) return;
  const size_t groups = self.copies_groups.size() - pending, copies = self.copies_groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) {
    const Copy& copy = self.copies[i];
    memset(copy.shared, 0, 16);
    memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid_bytes));
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(copies));
  self.copies_groups.erase(self.copies_groups.begin(), self.copies_groups.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : self.copies_groups) end -= copies;
}

void* cluster_map(void* own_shared, unsigned rank) {
  const Block& own = *state.current->block;
  if (rank >= own.cluster->size) fail(cudaErrorLaunchFailure, "cluster_map to %u of %u", rank, own.cluster->size);
  const ptrdiff_t offset = static_cast<unsigned char*>(own_shared) - own.shared->base;
  if (offset < 0 || static_cast<size_t>(offset) > own.shared->bytes) {
    fail(cudaErrorIllegalAddress, "cluster_map of what is not in shared memory");
  }
  return own.cluster->blocks[rank].shared->base + offset;
}

}  // namespace shim

unsigned cluster_block_rank() {
  return shim::state.current->block->rank;
}

unsigned cluster_size() {
  return shim::state.current->block->cluster->size;
}

void cluster_sync(shim::Where where) {
  shim::Cluster& cluster = *shim::state.current->block->cluster;
  shim::arrive(cluster.waiting, cluster.live, "cluster_sync", where);
}

float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

bfloat16 to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (isnan(value)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

float to_float(float16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                  : ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return (value.bits >> 15) != 0 ? -magnitude : magnitude;
}

float16 to_float16(float value) {
  const auto sign = static_cast<uint16_t>(signbit(value) ? 0x8000 : 0);
  const float magnitude = fabsf(value);
  if (isnan(value)) return {0x7FFF};
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7C00)};
  // In units of the last place, rounded to nearest even by the default mode; a carry moves on into the exponent.
  const int exponent = std::max(magnitude == 0 ? -14 : ilogbf(magnitude), -14);
  const auto units = static_cast<int>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

uint32_t float_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return isfinite(value) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}

}  // namespace consequentialism::cuda

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchTimeout:
      return "the launch timed out and was terminated";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

namespace shim = consequentialism::cuda::shim;

extern "C" {

void* shim_allocate(const char* name, size_t bytes, size_t alignment, int at_start) {
  shim::Region& region = shim::state.buffers.emplace_back();
  region.name = name;
  region.reserve(bytes + alignment);
  region.place(bytes, alignment, at_start != 0);
  return region.base;
}

void shim_free(void* pointer) {
  auto& buffers = shim::state.buffers;
  const auto found =
      std::find_if(buffers.begin(), buffers.end(), [&](const shim::Region& region) { return region.base == pointer; });
  if (found == buffers.end()) return;
  munmap(found->map, found->map_bytes);
  buffers.erase(found);
}

void shim_write(void* pointer, const void* source, size_t bytes) {
  memcpy(pointer, source, bytes);
}

void shim_read(void* target, const void* pointer, size_t bytes) {
  memcpy(target, pointer, bytes);
}

// 0 if nothing around any buffer was written to; every launch asks too.
int shim_check() {
  return shim::buffers_whole() ? 0 : shim::state.error;
}

void shim_set_seed(uint64_t seed) {
  shim::state.seed = seed;
  shim::state.message.clear();
}

void shim_set_seconds(double seconds) {
  shim::state.seconds_allowed = seconds;
}

const char* shim_message() {
  return shim::state.message.c_str();
}

uint64_t shim_launches() {
  return shim::state.launches;
}

uint64_t shim_shared_bytes() {
  return shim::state.shared_bytes;
}

uint64_t shim_switches() {
  return shim::state.switches;
}

void shim_reset_counts() {
  shim::state.launches = shim::state.shared_bytes = shim::state.switches = 0;
}

}  // extern "C"
