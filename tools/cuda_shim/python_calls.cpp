// What tools/cuda_shim/__init__.py calls.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

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

uint64_t shim_attributes_set() {
  return shim::state.attributes_set;
}

uint64_t shim_kernels_asked() {
  return shim::state.kernels_asked.size();
}

// At most kResidentBlocks.
void shim_set_resident_blocks(uint64_t count) {
  shim::state.resident_blocks = count;
}

// The query of clusters or of a stream after so many right ones fails, once.
void shim_fail_query(int64_t queries_right, int64_t error) {
  shim::state.queries_right = queries_right;
  shim::state.query_error = static_cast<cudaError_t>(error);
}

// What the kernels were compiled from, and of how many processors are how many groups, of one of which a cluster's are.
void shim_set_device(int64_t ptx_version, int64_t groups, int64_t group_processors) {
  shim::state.ptx_version = static_cast<int>(ptx_version);
  shim::state.groups = static_cast<int>(groups);
  shim::state.group_processors = static_cast<unsigned>(group_processors);
}

// Whatever has a stream's handle from now on is another stream.
void shim_destroy_streams() {
  shim::state.stream_ids.clear();
}

void shim_reset_counts() {
  shim::state.launches = shim::state.shared_bytes = shim::state.switches = shim::state.attributes_set = 0;
  shim::state.kernels_asked.clear();
}

}  // extern "C"
