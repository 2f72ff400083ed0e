// Steps of SGD, RMSprop, Adam and Muon on many parameters, of a weight in emended coordinates with the bias beside it:
// for one weight after the other [g | g_bias] S, what the rule wants to add, and [W | bias] <- kept [W | bias] + change
// S^T, in room for the largest of them. With a root L of the outputs the rule sees L [g | g_bias] S, and L change S^T
// is added. consequentialism/optim/inside.py does the same in Python.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../block_spans.h"
#include "../guards.h"
#include "orthogonalised.h"
#include "step_loops.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // entries that are worth a thread
constexpr int64_t kPanel = 64;                // columns of a triangular root that one product takes

// How a weight kinds beside its root: without one; as [O, ...] and [groups, n, b, b]; as [I, O] and [1, n, b, b]; as
// [V, E] and a diagonal [V].
enum Kind : int64_t { kPlain, kRows, kColumns, kDiagonal };

// Lists with an entry for each parameter, gradient, moment and count of steps, a bias behind its weight; roots has one
// for each weight that is not plain, output_roots one for each of kRows and kColumns, or none at all; kinds and
// members, the number of its parameters, one for each weight.
struct Arguments {
  at::TensorList parameters, gradients, first, second, counts, roots, output_roots;
  at::IntArrayRef kinds, members;
  at::ArrayRef<double> kept, coupled, rates;
};

void check(const Arguments& given, int64_t moments, bool counted) {
  const size_t count = given.parameters.size();
  const auto check_length = [&](const char* name, size_t length, size_t expected) {
    TORCH_CHECK_VALUE(length == expected, name, " must have ", expected, " entries, got ", length);
  };
  const auto check_like = [&](const char* name, const at::TensorList& values) {
    check_length(name, values.size(), count);
    for (size_t p = 0; p < count; ++p) {
      const at::Tensor &own = given.parameters[p], &value = values[p];
      TORCH_CHECK_VALUE(
          value.sizes() == own.sizes() && value.scalar_type() == given.parameters[0].scalar_type() &&
              value.is_contiguous() && value.device().is_cpu(),
          name, "[", p, "] must be contiguous, on the CPU, ", given.parameters[0].scalar_type(), " and of the shape ",
          own.sizes(), ", got ", value.scalar_type(), " of shape ", value.sizes(), " and strides ", value.strides());
    }
  };
  check_like("parameters", given.parameters);
  check_like("gradients", given.gradients);
  if (moments > 0) check_like("the first moments", given.first);
  if (moments > 1) check_like("the second moments", given.second);
  check_length("counts", given.counts.size(), counted ? count : 0);
  for (const at::Tensor& steps : given.counts) {
    TORCH_CHECK_VALUE(
        steps.numel() == 1 && steps.device().is_cpu() && at::isFloatingType(steps.scalar_type()),
        "counts must have one number each, floating-point and on the CPU, got ", steps.scalar_type(), " of shape ",
        steps.sizes());
  }
  check_length("kept", given.kept.size(), count);
  check_length("coupled", given.coupled.size(), count);
  check_length("rates", given.rates.size(), count);
  check_length("members", given.members.size(), given.kinds.size());
  size_t p = 0, rooted = 0, squares = 0;
  for (size_t i = 0; i < given.kinds.size(); ++i) {
    const int64_t kind = given.kinds[i], members = given.members[i];
    TORCH_CHECK_VALUE(kind >= kPlain && kind <= kDiagonal, "kinds must be from 0 to 3, got ", kind);
    const bool may_have_bias = kind == kRows || kind == kColumns;
    TORCH_CHECK_VALUE(
        members == 1 || (members == 2 && may_have_bias), "members must be 1, or 2 for a weight and its bias, got ",
        members);
    TORCH_CHECK_VALUE(p + members <= count, "parameters must have more than ", count, " entries");
    if (kind != kPlain) {
      TORCH_CHECK_VALUE(rooted < given.roots.size(), "roots must have more than ", given.roots.size(), " entries");
      const at::Tensor &root = given.roots[rooted++], &weight = given.parameters[p];
      bool fits = root.scalar_type() == weight.scalar_type() && root.is_contiguous() && root.device().is_cpu() &&
                  weight.dim() >= 2 && weight.numel() > 0;
      if (fits && kind == kDiagonal) {
        fits = root.dim() == 1 && weight.dim() == 2 && root.size(0) == weight.size(0);
      } else if (fits) {
        fits = root.dim() == 4 && root.size(0) > 0 && root.size(1) > 0 && root.size(2) == root.size(3);
        const int64_t inputs = kind == kRows ? weight.numel() / std::max<int64_t>(weight.size(0), 1) : weight.size(0);
        const int64_t outputs = kind == kRows ? weight.size(0) : weight.numel() / std::max<int64_t>(inputs, 1);
        fits = fits && (kind == kRows || (weight.dim() == 2 && root.size(0) == 1)) && outputs % root.size(0) == 0 &&
               root.size(2) == block_order(inputs, root.size(1), members == 2) &&
               (members == 1 || given.parameters[p + 1].numel() == outputs);
      }
      TORCH_CHECK_VALUE(
          fits, "roots[", rooted - 1, "] of shape ", root.sizes(), " and ", root.scalar_type(),
          " does not fit a weight of shape ", weight.sizes(), " and ", weight.scalar_type());
      if (kind != kDiagonal && !given.output_roots.empty()) {
        TORCH_CHECK_VALUE(
            squares < given.output_roots.size(), "output_roots must have more than ", squares, " entries");
        const at::Tensor& left = given.output_roots[squares];
        const int64_t outputs = weight.size(kind == kRows ? 0 : 1) / root.size(0);
        TORCH_CHECK_VALUE(
            left.dim() == 4 && left.size(0) == root.size(0) && left.size(1) > 0 && left.size(2) == left.size(3) &&
                left.size(2) == block_order(outputs, left.size(1), false) && left.is_contiguous() &&
                left.scalar_type() == weight.scalar_type() && left.device().is_cpu(),
            "output_roots[", squares, "] of shape ", left.sizes(), " and ", left.scalar_type(),
            " does not fit a weight of shape ", weight.sizes(), " and ", weight.scalar_type());
        ++squares;
      }
    }
    p += members;
  }
  TORCH_CHECK_VALUE(p == count, "members must add up to ", count, " parameters, got ", p);
  check_length("roots", given.roots.size(), rooted);
  if (!given.output_roots.empty()) check_length("output_roots", given.output_roots.size(), squares);
}

// The gradient with the decay that is added to it.
at::Tensor with_decay(const Arguments& given, size_t p) {
  const double coupled = given.coupled[p];
  return coupled == 0 ? given.gradients[p] : at::add(given.gradients[p], given.parameters[p], coupled);
}

// How many steps a parameter has taken once this one is.
double steps_after(const at::Tensor& count) {
  return count.item<double>() + 1;
}

// A root, how its weight [O, I] lies in memory, in each of its groups, and the operations between weights and columns
// for the bias, all without gaps.
template <typename scalar_t>
class Coordinates {
 public:
  Coordinates(const at::Tensor& root, const at::Tensor& weight, bool by_columns)
      : root_(root),
        by_columns_(by_columns),
        groups_(root.size(0)),
        blocks_(root.size(1)),
        order_(root.size(2)),
        outputs_(by_columns ? weight.size(1) : weight.size(0) / groups_),
        inputs_(weight.numel() / (groups_ * outputs_)) {}

  // out <- kept out + values S, with transposed by S^T; with columns for the bias, or without any, null. With kept and
  // kept_column 0 out is not read.
  void add_product_(
      const at::Tensor& out, scalar_t* out_column, const at::Tensor& values, const scalar_t* column, double kept,
      double kept_column, bool transposed) const {
    for (int64_t group = 0; group < groups_; ++group) {
      for (int64_t i = 0; i < blocks_; ++i) {
        const int64_t begin = block_begin(inputs_, blocks_, i), size = block_begin(inputs_, blocks_, i + 1) - begin;
        const int64_t from = group * outputs_ * inputs_ + begin * (by_columns_ ? outputs_ : 1);
        add_square_product_(out, values, from, size, group * blocks_ + i, kept, transposed);
        if (column == nullptr || i < blocks_ - 1) continue;
        const scalar_t* last = root_.const_data_ptr<scalar_t>() + (group * blocks_ + i) * order_ * order_;
        const scalar_t* bottom = last + size * order_;
        std::vector<scalar_t> right(size);
        for (int64_t k = 0; k < size; ++k) right[k] = last[k * order_ + size];
        const int64_t first = group * outputs_;
        at::parallel_for(0, outputs_, std::max<int64_t>(kGrain / size, 1), [&](int64_t low, int64_t high) {
          const int64_t at = from + low * (by_columns_ ? 1 : inputs_);
          add_edge(
              Edge<scalar_t>{
                  high - low, size, by_columns_ ? outputs_ : inputs_, by_columns_,
                  out.mutable_data_ptr<scalar_t>() + at, out_column + first + low,
                  values.const_data_ptr<scalar_t>() + at, column + first + low, transposed ? bottom : right.data(),
                  transposed ? right.data() : bottom, bottom[size], static_cast<scalar_t>(kept_column)});
        });
      }
    }
  }

  // out <- L values, with columns as above; L [groups, n, b, b].
  void left_product(
      const at::Tensor& left, const at::Tensor& out, scalar_t* out_column, const at::Tensor& values,
      const scalar_t* column) const {
    const int64_t blocks = left.size(1), order = left.size(2);
    for (int64_t group = 0; group < groups_; ++group) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t begin = block_begin(outputs_, blocks, i), size = block_begin(outputs_, blocks, i + 1) - begin;
        const int64_t from = group * outputs_ * inputs_ + begin * (by_columns_ ? 1 : inputs_);
        const int64_t corner = (group * blocks + i) * order * order;
        at::Tensor part = rows(out, from, inputs_, size);
        at::addmm_out(
            part, part, left.as_strided({size, size}, {order, 1}, left.storage_offset() + corner),
            rows(values, from, inputs_, size), 0, 1);
        if (column == nullptr) continue;
        const scalar_t* square = left.const_data_ptr<scalar_t>() + corner;
        const int64_t first = group * outputs_ + begin;
        for (int64_t row = 0; row < size; ++row) {
          out_column[first + row] =
              std::inner_product(square + row * order, square + row * order + size, column + first, scalar_t(0));
        }
      }
    }
  }

 private:
  // One block's inputs of `add_product_`, of which there are so many, from an entry on.
  void add_square_product_(
      const at::Tensor& out, const at::Tensor& values, int64_t from, int64_t size, int64_t block, double kept,
      bool transposed) const {
    const at::Tensor whole = square(block, size, transposed);
    const int64_t panel = is_upper(block, size) ? kPanel : size, stride = by_columns_ ? outputs_ : 1;
    for (int64_t begin = 0; begin < size; begin += panel) {
      const int64_t end = std::min(begin + panel, size);
      // Of these columns of S the rows above end, of S^T those from begin on.
      const int64_t first = transposed ? begin : 0, last = transposed ? size : end;
      at::Tensor part = rows(out, from + begin * stride, end - begin);
      at::addmm_out(
          part, part, rows(values, from + first * stride, last - first),
          whole.narrow(0, first, last - first).narrow(1, begin, end - begin), kept, 1);
    }
  }

  // Whether a block is zero below the squares of kPanel on its diagonal, as a triangular root; a symmetric one is not
  // by its first entry.
  bool is_upper(int64_t block, int64_t size) const {
    const scalar_t* entries = root_.const_data_ptr<scalar_t>() + block * order_ * order_;
    for (int64_t i = kPanel; i < size; ++i) {
      const scalar_t* row = entries + i * order_;
      if (std::any_of(row, row + i / kPanel * kPanel, [](scalar_t entry) { return entry != 0; })) return false;
    }
    return true;
  }

  // So many inputs of all outputs [O, n], or of so many [m, n], from an entry on.
  at::Tensor rows(const at::Tensor& value, int64_t from, int64_t size) const {
    return rows(value, from, size, outputs_);
  }

  at::Tensor rows(const at::Tensor& value, int64_t from, int64_t size, int64_t outputs) const {
    return value.as_strided(
        {outputs, size}, {by_columns_ ? 1 : inputs_, by_columns_ ? outputs_ : 1}, value.storage_offset() + from);
  }

  at::Tensor square(int64_t block, int64_t size, bool transposed) const {
    return root_.as_strided(
        {size, size}, {transposed ? 1 : order_, transposed ? order_ : 1},
        root_.storage_offset() + block * order_ * order_);
  }

  const at::Tensor& root_;
  bool by_columns_;
  int64_t groups_, blocks_, order_, outputs_, inputs_;
};

// Muon, whose change is that of whole matrices, one above the other.
struct Muon : Momentum {
  double rate;
  at::ArrayRef<double> coefficients;
  int64_t steps;
  double epsilon;
  int64_t parts;
};

// What a rule makes of a parameter's change, or of its gradient where there is none, as a whole.
template <typename Rule, typename scalar_t>
void make_whole(const Rule&, const at::Tensor&, scalar_t*) {}

template <typename scalar_t>
void make_whole(const Muon& rule, const at::Tensor& parameter, scalar_t* change) {
  const int64_t rows = parameter.size(0), columns = parameter.numel() / rows;
  const at::Tensor matrices = at::from_blob(change, {rule.parts, rows / rule.parts, columns}, parameter.options());
  for (int64_t part = 0; part < rule.parts; ++part) {
    const at::Tensor matrix = matrices.select(0, part);
    orthogonalise_(matrix, rule.coefficients, rule.steps, rule.epsilon);
    matrix.mul_(-rule.rate);
  }
}

// Takes the steps of all parameters, of one type; rule_of(p) is that of one.
template <typename scalar_t, typename RuleOf>
void step_each(const Arguments& given, int64_t moments, const RuleOf& rule_of) {
  int64_t most = 0;
  for (const at::Tensor& parameter : given.parameters) most = std::max(most, parameter.numel());
  const bool two_sides = !given.output_roots.empty();
  const at::Tensor room = at::empty({most}, given.parameters[0].options());
  const at::Tensor inner = two_sides ? at::empty({most}, room.options()) : room;
  scalar_t* const change = room.mutable_data_ptr<scalar_t>();
  const auto turn = [&](size_t p, scalar_t* own) {
    const auto rule = rule_of(p);
    scalar_t* first = moments > 0 ? given.first[p].mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* second = moments > 1 ? given.second[p].mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, given.parameters[p].numel(), kGrain, [&](int64_t begin, int64_t end) {
      const auto from = [&](scalar_t* values) { return values == nullptr ? nullptr : values + begin; };
      apply(rule, end - begin, own + begin, from(first), from(second));
    });
    make_whole(rule, given.parameters[p], own);
  };
  size_t p = 0, rooted = 0, squares = 0;
  for (size_t i = 0; i < given.kinds.size(); ++i) {
    const int64_t kind = given.kinds[i];
    const at::Tensor& weight = given.parameters[p];
    const at::Tensor gradient = with_decay(given, p);
    if (kind == kRows || kind == kColumns) {
      const Coordinates<scalar_t> coordinates(given.roots[rooted++], weight, kind == kColumns);
      const bool bias = given.members[i] == 2;
      const at::Tensor bias_gradient = bias ? with_decay(given, p + 1) : at::Tensor();
      std::vector<scalar_t> bias_change(bias ? bias_gradient.numel() : 0);
      scalar_t* const column = bias ? bias_change.data() : nullptr;
      coordinates.add_product_(
          room, column, gradient, bias ? bias_gradient.const_data_ptr<scalar_t>() : nullptr, 0, 0, false);
      std::vector<scalar_t> bias_inner(two_sides ? bias_change.size() : 0);
      scalar_t* const inner_column = two_sides && bias ? bias_inner.data() : column;
      const at::Tensor left = two_sides ? given.output_roots[squares++] : at::Tensor();
      if (two_sides) coordinates.left_product(left, inner, inner_column, room, column);
      turn(p, inner.mutable_data_ptr<scalar_t>());
      if (bias) turn(p + 1, inner_column);
      if (two_sides) coordinates.left_product(left, room, column, inner, inner_column);
      coordinates.add_product_(
          weight, bias ? given.parameters[p + 1].mutable_data_ptr<scalar_t>() : nullptr, room, column, given.kept[p],
          bias ? given.kept[p + 1] : 0, true);
    } else {
      const scalar_t* diagonal = kind == kDiagonal ? given.roots[rooted++].const_data_ptr<scalar_t>() : nullptr;
      const int64_t width = kind == kDiagonal ? weight.size(1) : 1;
      const scalar_t* seen = gradient.const_data_ptr<scalar_t>();
      scalar_t* own = weight.mutable_data_ptr<scalar_t>();
      const auto scale = [&](const scalar_t* in) {
        at::parallel_for(0, weight.size(0), std::max<int64_t>(kGrain / width, 1), [&](int64_t begin, int64_t end) {
          const int64_t from = begin * width;
          scale_rows(end - begin, width, change + from, in + from, diagonal + begin);
        });
      };
      if (diagonal != nullptr) {
        scale(seen);
      } else {
        std::copy_n(seen, weight.numel(), change);
      }
      turn(p, change);
      if (diagonal != nullptr) scale(change);
      at::parallel_for(0, weight.numel(), kGrain, [&](int64_t begin, int64_t end) {
        add_change(end - begin, own + begin, change + begin, given.kept[p]);
      });
    }
    for (const size_t end = p + given.members[i]; p < end; ++p) {
      given.parameters[p].unsafeGetTensorImpl()->bump_version();
      if (!given.counts.empty()) at::Tensor(given.counts[p]).fill_(steps_after(given.counts[p]));
    }
  }
}

template <typename RuleOf>
void step_all(const Arguments& given, int64_t moments, bool counted, const RuleOf& rule_of) {
  check(given, moments, counted);
  if (given.parameters.empty()) return;
  const PlainKernelGuard guard;
  AT_DISPATCH_FLOATING_TYPES(
      given.parameters[0].scalar_type(), "coordinate_step", [&] { step_each<scalar_t>(given, moments, rule_of); });
}

}  // namespace

void sgd_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList buffers, at::TensorList roots,
    at::TensorList output_roots, at::IntArrayRef kinds, at::IntArrayRef members, at::ArrayRef<double> kept,
    at::ArrayRef<double> coupled, at::ArrayRef<double> rates, double momentum, double dampening, bool nesterov) {
  const Arguments given{parameters,   gradients, buffers, {},   {},      roots,
                        output_roots, kinds,     members, kept, coupled, rates};
  step_all(given, momentum != 0, false, [&](size_t p) { return Sgd{rates[p], momentum, dampening, nesterov}; });
}

void rmsprop_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList squares, at::TensorList buffers,
    at::TensorList counts, at::TensorList roots, at::TensorList output_roots, at::IntArrayRef kinds,
    at::IntArrayRef members, at::ArrayRef<double> kept, at::ArrayRef<double> coupled, at::ArrayRef<double> rates,
    double alpha, double momentum, double epsilon) {
  const Arguments given{parameters,   gradients, squares, buffers, counts,  roots,
                        output_roots, kinds,     members, kept,    coupled, rates};
  step_all(given, 1 + (momentum > 0), true, [&](size_t p) { return Rmsprop{rates[p], alpha, momentum, epsilon}; });
}

void adam_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList means, at::TensorList squares,
    at::TensorList counts, at::TensorList roots, at::TensorList output_roots, at::IntArrayRef kinds,
    at::IntArrayRef members, at::ArrayRef<double> kept, at::ArrayRef<double> coupled, at::ArrayRef<double> rates,
    double beta1, double beta2, double epsilon) {
  const Arguments given{parameters,   gradients, means,   squares, counts,  roots,
                        output_roots, kinds,     members, kept,    coupled, rates};
  step_all(given, 2, true, [&](size_t p) {
    const double steps = steps_after(counts[p]);
    const double first = 1 - std::pow(beta1, steps), second = 1 - std::pow(beta2, steps);
    return Adam{rates[p] / first, 1 / std::sqrt(second), beta1, beta2, epsilon};
  });
}

void muon_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList buffers, at::TensorList roots,
    at::TensorList output_roots, at::IntArrayRef kinds, at::IntArrayRef members, at::ArrayRef<double> kept,
    at::ArrayRef<double> coupled, at::ArrayRef<double> rates, double momentum, bool nesterov,
    at::ArrayRef<double> coefficients, int64_t steps, double epsilon, int64_t parts) {
  TORCH_CHECK_VALUE(coefficients.size() == 3, "coefficients must be 3, got ", coefficients.size());
  TORCH_CHECK_VALUE(steps >= 0, "steps must be at least 0, got ", steps);
  TORCH_CHECK_VALUE(parts >= 1, "parts must be at least 1, got ", parts);
  for (size_t p = 0; p < parameters.size(); ++p) {
    const at::Tensor& own = parameters[p];
    TORCH_CHECK_VALUE(
        own.dim() >= 2 && own.numel() > 0 && own.size(0) % parts == 0, "parameters[", p, "] must have ", parts,
        " matrices one above the other, got the shape ", own.sizes());
  }
  const Arguments given{parameters,   gradients, buffers, {},   {},      roots,
                        output_roots, kinds,     members, kept, coupled, rates};
  step_all(given, 1, false, [&](size_t p) {
    return Muon{{momentum, nesterov}, rates[p], coefficients, steps, epsilon, parts};
  });
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("sgd_step_", consequentialism::cpu::sgd_step_);
  m.impl("rmsprop_step_", consequentialism::cpu::rmsprop_step_);
  m.impl("adam_step_", consequentialism::cpu::adam_step_);
  m.impl("muon_step_", consequentialism::cpu::muon_step_);
}
