// Runs a launch on the host. The blocks that must be resident together (one, a cluster, or the whole grid of a
// cooperative launch) have one fiber a thread, the others follow one after the other. A fiber runs until it waits;
// then the ready fiber that comes first runs:
//   seed 0     the lowest thread, so that each warp gets as far ahead of the next ones as barriers let it;
//   seed 1     the highest;
//   seed 2...  pseudo-random priorities of warps, drawn anew at each barrier, and of lanes.
// Memory lies between pages that fault: against the one behind it with even seeds, against the one before it with odd
// ones; what is left of its own pages holds 0xFF, which is checked afterwards. So does fresh memory: a NaN in every
// type. An error ends the launch by a jump from the fiber, or from the handler of its signal, back into `run`.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace consequentialism::cuda::shim {

State state;

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
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
  check_products_of_warp(*self.warp);
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
    const unsigned warps = (blockDim.x * blockDim.y * blockDim.z + 31) / 32;
    check_products_of_block(&state.warps[self.warp->index / warps * warps], warps);
    if (!close_block(block)) fail_with(state.error, state.message);
    for (unsigned id = 0; id < kNamedBarriers; ++id) {
      const NamedBarrier& named = block.named[id];
      if (named.arrived.empty()) continue;
      fail(cudaErrorLaunchFailure, "named barrier %u: %zu of %u threads came", id, named.arrived.size(), named.threads);
    }
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
    for (NamedBarrier& named : own.named) named = {};
    own.live = threads;
    own.rank = static_cast<unsigned>(b % cluster);
    own.index = {
        static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
        static_cast<unsigned>(linear / grid.x / grid.y)};
    own.cluster = &state.clusters[b / cluster];
    own.shared = &state.shared[b];
    own.shared->protect(PROT_READ | PROT_WRITE);
    own.shared->place(shared_bytes, kSharedAlignment, state.seed % 2 == 1);
    own.marks.assign(shared_bytes / kMarkBytes + 1, {});
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
      fiber.copies_issued = fiber.copies_landed = fiber.copies_fenced = 0;
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
  const auto allowed = state.allowed_shared.find(kernel);
  if (shared_bytes > (allowed == state.allowed_shared.end() ? kSharedWithoutAsking : allowed->second)) {
    return refused(cudaErrorInvalidValue, "more shared memory than its attribute allows");
  }
  if (cluster == 0 || cluster > kMaxCluster) return refused(cudaErrorInvalidValue, "no such cluster");
  if (cluster > kClusterWithoutAsking && !state.allowed_clusters.contains(kernel)) {
    return refused(cudaErrorInvalidValue, "a larger cluster than its attribute allows");
  }
  if (grid.x % cluster != 0) return refused(cudaErrorInvalidValue, "a grid that is no multiple of the cluster");
  if (grid.x > 0x7FFFFFFFu || grid.y > kMaxGridYz || grid.z > kMaxGridYz) {
    return refused(cudaErrorInvalidValue, "too large a grid");
  }
  if (cooperative && blocks > state.resident_blocks) {
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

void block_barrier(const Where& where) {
  Block& block = *state.current->block;
  arrive(block.waiting, block.live, "__syncthreads", where);
}

// The running thread comes to a barrier of so many threads of its block, and waits there or goes on. Whoever is ready
// may overtake it then too: what it writes only now is not there for those that the barrier lets through.
void named_barrier(const char* name, int id, int threads, bool waits, const Where& where) {
  Fiber& self = *state.current;
  if (id < 1 || id >= static_cast<int>(kNamedBarriers) || threads <= 0 || threads % 32 != 0) {
    fail(cudaErrorLaunchFailure, "%s(%d, %d) at %s", name, id, threads, describe(where).c_str());
  }
  NamedBarrier& named = self.block->named[id];
  if (!named.arrived.empty() && named.threads != static_cast<unsigned>(threads)) {
    fail(
        cudaErrorLaunchFailure, "%s(%d, %d) at %s: others are for %u threads", name, id, threads,
        describe(where).c_str(), named.threads);
  }
  if (std::find(named.arrived.begin(), named.arrived.end(), &self) != named.arrived.end()) {
    fail(cudaErrorLaunchFailure, "%s(%d, %d) at %s: twice", name, id, threads, describe(where).c_str());
  }
  named.threads = static_cast<unsigned>(threads);
  named.arrived.push_back(&self);
  if (waits) {
    named.waiting.push_back(&self);
    self.waits_in = name;
    self.where = where;
  }
  if (named.arrived.size() == named.threads) {
    named.arrived.clear();
    release(named.waiting);
  }
  if (!waits) make_ready(self);
  suspend();
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

}  // namespace consequentialism::cuda::shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int ptx_version = consequentialism::cuda::shim::state.ptx_version;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = ptx_version / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = ptx_version % 10;
      break;
    default:
      *value = static_cast<int>(consequentialism::cuda::shim::kMaxSharedBytes);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  consequentialism::cuda::shim::State& state = consequentialism::cuda::shim::state;
  if (state.queries_right-- == 0) return state.query_error;
  const auto [found, is_new] = state.stream_ids.try_emplace(stream, state.next_stream_id);
  if (is_new) ++state.next_stream_id;
  *id = found->second;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  consequentialism::cuda::shim::State& state = consequentialism::cuda::shim::state;
  const std::lock_guard guard(state.lock);
  state.kernels_asked.insert(kernel);
  attributes->ptxVersion = state.ptx_version;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  using namespace consequentialism::cuda::shim;
  *count = 0;
  if (state.queries_right-- == 0) return state.query_error;
  const unsigned cluster = config->numAttrs == 1 ? config->attrs->val.clusterDim.x : 1;
  const auto allowed = state.allowed_shared.find(kernel);
  const bool asked = cluster <= kClusterWithoutAsking || state.allowed_clusters.contains(kernel);
  if (!asked || (cluster > kClusterWithoutAsking && cluster > state.group_processors)) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > (allowed == state.allowed_shared.end() ? kSharedWithoutAsking : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  const size_t of_processor = kMaxSharedBytes / std::max<size_t>(config->dynamicSmemBytes, kReservedShared);
  const auto blocks = state.group_processors * std::clamp<size_t>(of_processor, 1, kMaxThreads / config->blockDim.x);
  *count = state.groups * static_cast<int>(blocks / cluster);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  consequentialism::cuda::shim::State& state = consequentialism::cuda::shim::state;
  const std::lock_guard guard(state.lock);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    state.allowed_clusters.insert(kernel);
    return cudaSuccess;
  }
  state.allowed_shared[kernel] = static_cast<size_t>(value);
  ++state.attributes_set;
  return cudaSuccess;
}

namespace consequentialism::cuda {

void named_barrier_arrive(int id, int threads, shim::Where where) {
  shim::named_barrier("named_barrier_arrive", id, threads, false, where);
}

void named_barrier_wait(int id, int threads, shim::Where where) {
  shim::named_barrier("named_barrier_wait", id, threads, true, where);
}

void cluster_sync(shim::Where where) {
  shim::Cluster& cluster = *shim::state.current->block->cluster;
  shim::arrive(cluster.waiting, cluster.live, "cluster_sync", where);
}

}  // namespace consequentialism::cuda
