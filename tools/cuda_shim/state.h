// What a launch on the host consists of, shared by the parts of the shim.
#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber_context.h"
#include "guarded_memory.h"
#include "shim.h"
#include "wgmma.cuh"

namespace consequentialism::cuda::shim {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedAlignment = 128;
constexpr size_t kMaxSharedBytes = 232448;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16, kMaxGridYz = 65535;
constexpr unsigned kClusterWithoutAsking = 8;
constexpr size_t kReservedShared = 1024;  // of a block, beside its own
constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr unsigned kResidentBlocks = 132;  // the processors of an H100, one block each

struct Copy {
  void* shared;
  const void* global;
  int valid_bytes;
};

struct Block;
struct Fiber;
struct Warp;

// Who last copied to 16 bytes of shared memory, by which of his copies.
constexpr size_t kMarkBytes = 16;
struct CopyMark {
  const Fiber* fiber = nullptr;
  uint64_t copy = 0;
};

// Sums of all lanes of a warp while products add to them.
struct PendingSums {
  float* sums[32];
  std::vector<float> values;
  int products = 0;
};

struct PendingProduct {
  Product product;
  const float* sums;  // of lane 0
};

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
  uint64_t copies_issued, copies_landed, copies_fenced;
};

struct Warp {
  Fiber* first;
  uint32_t live, waiting;  // lanes
  unsigned index, epoch;

  std::vector<PendingProduct> products = {};  // asynchronous, as the copies of a fiber
  std::vector<size_t> groups = {};
  std::vector<PendingSums> pending = {};
  bool fenced = false;
  uint64_t issued = 0;  // a digest of all products
};

struct Cluster {
  std::vector<Fiber*> waiting;
  unsigned live = 0, size = 1;
  Block* blocks = nullptr;
};

// Who has come to a barrier of some of a block's threads, and of those who waits.
struct NamedBarrier {
  std::vector<const Fiber*> arrived;
  std::vector<Fiber*> waiting;
  unsigned threads = 0;
};
constexpr unsigned kNamedBarriers = 16;

struct Block {
  std::vector<Fiber*> waiting;
  NamedBarrier named[kNamedBarriers];
  unsigned live, rank;
  uint3 index;
  bool started;
  Cluster* cluster;
  Region* shared;
  std::vector<CopyMark> marks;  // of shared memory
};

using Ready = std::pair<uint64_t, Fiber*>;  // the least runs first

struct State {
  std::mutex lock;
  std::string message;
  uint64_t seed = 0;
  double seconds_allowed = 60;
  uint64_t launches = 0, shared_bytes = 0, switches = 0, attributes_set = 0;
  int ptx_version = 90, groups = 1;
  unsigned group_processors = kMaxCluster;
  int64_t queries_right = -1;  // of clusters and of streams, before one that fails; less than 0: none does
  cudaError_t query_error = cudaSuccess;
  uint64_t resident_blocks = kResidentBlocks;
  std::map<const void*, unsigned long long> stream_ids;
  unsigned long long next_stream_id = 1;
  std::map<const void*, size_t> allowed_shared;  // by kernel
  std::set<const void*> allowed_clusters;        // kernels that may have more than every chip takes
  std::set<const void*> kernels_asked;           // for their attributes, which loads the module that they are in

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

extern State state;

// scheduler.cpp
uint64_t mix(uint64_t x);
void make_ready(Fiber& fiber);
void suspend();  // goes on with whoever comes next, which may be the running thread itself
void arrive(std::vector<Fiber*>& waiting, unsigned live, const char* name, const Where& where);

// warpgroup.cpp
void check_products_of_warp(const Warp& warp);
void check_products_of_block(const Warp* warps, unsigned count);

// errors.cpp
std::string describe(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string describe(const Where& where);
std::string describe(const uint3& index);
std::string describe(const Fiber& fiber);
std::string describe_code(const void* address);
std::string describe_address(const unsigned char* address);
[[noreturn]] void fail_with(cudaError_t error, const std::string& what);
void explain_fault();
void explain_deadlock();
bool buffers_whole();

// Faults of fibers come back into the launch while it is alive.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  stack_t previous_stack_;
};

}  // namespace consequentialism::cuda::shim
