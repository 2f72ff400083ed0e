// What tests/test_cuda_damped_inverse.py calls.
#include <vector>

#include "damped_inverse_launcher.h"

using namespace consequentialism::cuda;

namespace {

// Where resident_blocks is not 0, by a resident cluster of so many, also where one block would do.
InversePlan plan_of(int64_t n, size_t element_bytes, int64_t shared_limit, int64_t resident_blocks) {
  const auto shared = static_cast<size_t>(shared_limit);
  if (resident_blocks == 0) return plan_damped_inverse(n, 1, element_bytes, {shared, 132, true});
  return plan_resident_inverse(n, element_bytes, shared, static_cast<int>(resident_blocks));
}

template <class T>
int damped_inverse(
    const T* gram, T* inverse, const int* only_if, unsigned char* workspace, unsigned* breakdowns, int64_t count,
    int64_t n, int64_t padding, int64_t shared_limit, int64_t resident_blocks, bool tall, double damping, double rank,
    double factor, bool relative, bool scaled_by_c) {
  InversePlan plan = plan_of(n, sizeof(T), shared_limit, resident_blocks);
  if (tall) plan.tall_squares_from = 1;
  std::vector<InverseItem<T>> items;
  const int64_t stride = n + padding;
  for (int64_t i = 0; i < count; ++i) {
    items.push_back(
        {gram + i * n * n, inverse + i * n * stride, static_cast<int>(stride), only_if, damping, rank, factor, relative,
         scaled_by_c});
  }
  return launch_damped_inverse<T>(items.data(), static_cast<int>(count), n, plan, workspace, breakdowns, nullptr);
}

}  // namespace

extern "C" int call_damped_inverse_float(
    const float* gram, float* inverse, const int* only_if, unsigned char* workspace, unsigned* breakdowns,
    int64_t count, int64_t n, int64_t padding, int64_t shared_limit, int64_t resident_blocks, bool tall, double damping,
    double rank, double multiplier, bool relative, bool scaled_by_c) {
  return damped_inverse(
      gram, inverse, only_if, workspace, breakdowns, count, n, padding, shared_limit, resident_blocks, tall, damping,
      rank, multiplier, relative, scaled_by_c);
}

extern "C" int call_damped_inverse_double(
    const double* gram, double* inverse, const int* only_if, unsigned char* workspace, unsigned* breakdowns,
    int64_t count, int64_t n, int64_t padding, int64_t shared_limit, int64_t resident_blocks, bool tall, double damping,
    double rank, double multiplier, bool relative, bool scaled_by_c) {
  return damped_inverse(
      gram, inverse, only_if, workspace, breakdowns, count, n, padding, shared_limit, resident_blocks, tall, damping,
      rank, multiplier, relative, scaled_by_c);
}

// plan: team, threads, blocks, shared bytes, workspace bytes, tiles of its own that a resident block has room for,
// bytes of a strip's line. forced: as plan_of.
extern "C" int call_plan_damped_inverse(
    int64_t* plan, int64_t n, int64_t count, int64_t element_bytes, int64_t shared_limit, bool clusters,
    int64_t resident_blocks, int64_t resident_clusters, bool forced) {
  const auto bytes = static_cast<size_t>(element_bytes);
  Limits limits{static_cast<size_t>(shared_limit), 132, clusters};
  limits.resident_blocks = static_cast<int>(resident_blocks);
  limits.resident_clusters = static_cast<int>(resident_clusters);
  const InversePlan made =
      forced ? plan_of(n, bytes, shared_limit, resident_blocks) : plan_damped_inverse(n, count, bytes, limits);
  plan[0] = static_cast<int64_t>(made.team);
  plan[1] = made.threads;
  plan[2] = made.blocks;
  plan[3] = static_cast<int64_t>(made.shared_bytes);
  plan[4] = static_cast<int64_t>(made.workspace_bytes);
  plan[5] = made.resident.room;
  plan[6] = made.strip_line;
  return 0;
}

// The same by one block (cluster: by a resident cluster), on Hopper.
extern "C" int call_plan_damped_inverse_by(int64_t* plan, int64_t n, int64_t element_bytes, bool cluster) {
  const InverseTeam team = cluster ? InverseTeam::kResident : InverseTeam::kBlock;
  const InversePlan made = plan_damped_inverse_by(n, static_cast<size_t>(element_bytes), kHopper, team);
  plan[0] = static_cast<int64_t>(made.team);
  plan[1] = made.blocks;
  return 0;
}

extern "C" int call_clusters_run(int64_t* answer) {
  bool run = false;
  int resident_blocks = 0, resident_clusters = 0;
  const cudaError_t error = clusters_run(&run, &resident_blocks, &resident_clusters);
  answer[0] = run ? 1 : 0;
  answer[1] = resident_blocks;
  answer[2] = resident_clusters;
  return error;
}
