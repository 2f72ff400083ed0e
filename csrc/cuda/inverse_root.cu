// The inverse root by a coupled iteration: products of symmetric matrices that commute, whose upper triangle is
// computed and mirrored. float32 is multiplied in three products of TF32, whatever torch allows for its own.
#include "input_gram.cuh"
#include "inverse_root_launcher.h"

namespace consequentialism::cuda {

namespace {

constexpr int64_t kMaxBatch = 65535;  // along y

// Matrices [order, order], one after the other.
template <class G>
struct Matrices {
  G* data;
  int64_t stride;  // from row to row
  int64_t each;    // from matrix to matrix
};

template <class G>
MatrixView<G> operand_of(const Matrices<G>& matrices, int64_t batch) {
  MatrixView<G> view = view_of(static_cast<const G*>(matrices.data), matrices.stride);
  while (batch > 1 && matrices.each * static_cast<int64_t>(sizeof(G)) % view.unit != 0) view.unit /= 2;
  return view;
}

// out <- alpha a b + beta c + gamma I. out is none of the others.
template <class G>
struct Combination {
  G alpha, beta, gamma;
};

template <class Traits, class G>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) symmetric_product_kernel(
    const MatrixView<G> a, int64_t each_a, const MatrixView<G> b, int64_t each_b, const Matrices<G> c, int64_t order,
    const Combination<G> combination, const Matrices<G> out) {
  using P = typename Traits::P;
  using Operand = typename Traits::Operand;
  const UpperTile tile = upper_tile(blockIdx.x);
  const int64_t matrix = blockIdx.y;
  const int64_t first_row = static_cast<int64_t>(tile.row) * P::kTileM;
  const int64_t first_column = static_cast<int64_t>(tile.column) * P::kTileN;
  const MatrixView<G> own_a{a.data + matrix * each_a, a.stride, a.unit};
  const MatrixView<G> own_b{b.data + matrix * each_b, b.stride, b.unit};
  const G* own_c = c.data + matrix * c.each;
  G* own_out = out.data + matrix * out.each;
  const bool same = a.data == b.data && tile.row == tile.column;
  BlockSums<P> sums;
  block_product<P>(
      sums, Operand{own_a, first_row, order}, Operand{own_b, first_column, order}, same, 0, order,
      dynamic_shared<unsigned char>(), NoVector{});
  const auto write = [&](int64_t row, int64_t column, G sum) {
    if (row > column || column >= order) return;
    G value = combination.alpha * sum;
    if (combination.beta != G(0)) value += combination.beta * own_c[row * c.stride + column];
    if (row == column) value += combination.gamma;
    own_out[row * out.stride + column] = value;
    own_out[column * out.stride + row] = value;
  };
  for_each_pair<P>(sums, [&](int r, int column, G left, G right) {
    write(first_row + r, first_column + column, left);
    write(first_row + r, first_column + column + 1, right);
  });
}

template <class Traits, class G>
class Products {
 public:
  Products(const InverseRootShape& shape, const InverseRootPlan& plan, cudaStream_t stream)
      : shape_(shape), plan_(plan), stream_(stream) {}

  cudaError_t run(
      const Matrices<G>& out, const Matrices<G>& a, const Matrices<G>& b, const Matrices<G>& c, double alpha,
      double beta, double gamma) const {
    LaunchShape launch_shape{};
    launch_shape.grid = dim3(static_cast<unsigned>(plan_.blocks), static_cast<unsigned>(shape_.batch));
    launch_shape.block = dim3(Traits::kThreads);
    launch_shape.shared_bytes = plan_.shared_bytes;
    launch_shape.stream = stream_;
    const Combination<G> combination{static_cast<G>(alpha), static_cast<G>(beta), static_cast<G>(gamma)};
    return launch(
        symmetric_product_kernel<Traits, G>, launch_shape, operand_of(a, shape_.batch), a.each,
        operand_of(b, shape_.batch), b.each, c, shape_.order, combination, out);
  }

 private:
  InverseRootShape shape_;
  InverseRootPlan plan_;
  cudaStream_t stream_;
};

template <class G, int kTile, int kTerms>
cudaError_t launch_steps(
    const G* matrix, const InverseRootShape& shape, int64_t root, const double* coefficients, int64_t steps, G* result,
    const InverseRootPlan& plan, void* workspace, cudaStream_t stream) {
  using Traits = GramTraits<G, G, false, kTile, kTerms>;
  if (plan.shared_bytes != Traits::P::kSharedBytes) return cudaErrorInvalidValue;
  const Products<Traits, G> products(shape, plan, stream);
  const int64_t n = shape.order, each = n * plan.stride;
  const auto room = [&](int i) {
    return Matrices<G>{static_cast<G*>(workspace) + i * shape.batch * each, plan.stride, each};
  };
  const Matrices<G> whole{result, n, n * n};
  const Matrices<G> turns = room(0), powers[] = {room(1), room(2)}, others[] = {room(3), room(4)};
  const Matrices<G> found[] = {room(5), room(6)};
  Matrices<G> current{const_cast<G*>(matrix), n, n * n};  // only read
  Matrices<G> result_so_far = found[0];
  for (int64_t step = 0; step < steps; ++step) {
    const double* abc = coefficients + 3 * step;
    const bool last = step == steps - 1;
    const Matrices<G> turn = step > 0 ? turns : last ? whole : result_so_far;  // X = I before: X T is T
    cudaError_t error = products.run(turn, current, current, current, abc[2], abc[1], abc[0]);
    if (step > 0 && error == cudaSuccess) {
      const Matrices<G> to = last ? whole : found[step % 2];
      error = products.run(to, result_so_far, turn, turn, 1, 0, 0);
      result_so_far = to;
    }
    if (error != cudaSuccess || last) return error;
    Matrices<G> raised = turn;
    for (int64_t by = 1, i = 0; by < root; by *= 2, ++i) {
      if ((error = products.run(powers[i % 2], raised, raised, raised, 1, 0, 0)) != cudaSuccess) return error;
      raised = powers[i % 2];
    }
    const Matrices<G> to = others[step % 2];
    if ((error = products.run(to, raised, current, current, 1, 0, 0)) != cudaSuccess) return error;
    current = to;
  }
  return cudaSuccess;
}

}  // namespace

template <class G>
cudaError_t launch_inverse_root(
    const G* matrix, const InverseRootShape& shape, int64_t root, const double* coefficients, int64_t steps, G* result,
    const InverseRootPlan& plan, void* workspace, cudaStream_t stream) {
  const bool takes = plan.tile != 0 && steps > 0 && shape.order > 0 && shape.batch > 0;
  if (!takes || shape.batch > kMaxBatch || plan.blocks > kMaxGrid) return cudaErrorInvalidValue;
  constexpr int kTerms = std::is_same_v<G, float> ? 2 : 1;
  if constexpr (std::is_same_v<G, float>) {
    if (plan.tile == kLargeTile) {
      return launch_steps<G, kLargeTile, kTerms>(
          matrix, shape, root, coefficients, steps, result, plan, workspace, stream);
    }
  }
  if (plan.tile != kSmallTile) return cudaErrorInvalidValue;
  return launch_steps<G, kSmallTile, kTerms>(matrix, shape, root, coefficients, steps, result, plan, workspace, stream);
}

template cudaError_t launch_inverse_root<float>(
    const float*, const InverseRootShape&, int64_t, const double*, int64_t, float*, const InverseRootPlan&, void*,
    cudaStream_t);
template cudaError_t launch_inverse_root<double>(
    const double*, const InverseRootShape&, int64_t, const double*, int64_t, double*, const InverseRootPlan&, void*,
    cudaStream_t);

}  // namespace consequentialism::cuda
