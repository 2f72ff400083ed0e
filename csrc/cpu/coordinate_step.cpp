// Steps of SGD, RMSprop and Adam on many parameters, of a weight in emended coordinates with the bias beside it: for
// one weight after the other [g | g_bias] S, what the rule wants to add, and [W | bias] <- kept [W | bias] + change
// S^T, in room for the largest of them. consequentialism/optim/inside.py does the same in Python.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../block_spans.h"
#include "../guards.h"
#include "step_rules.h"

namespace consequentialism::cpu {

namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // entries that are worth a thread

// How a weight kinds beside its root: without one; as [O, ...] and [groups, n, b, b]; as [I, O] and [1, n, b, b]; as
// [V, E] and a diagonal [V].
enum Kind : int64_t { kPlain, kRows, kColumns, kDiagonal };

// Lists with an entry for each parameter, gradient, moment and count of steps, a bias behind its weight; roots has one
// for each weight that is not plain; kinds and members, the number of its parameters, one for each weight.
struct Arguments {
  at::TensorList parameters, gradients, first, second, counts, roots;
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
  size_t p = 0, rooted = 0;
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
      bool fits = root.scalar_type() == weight.scalar_type() && root.device().is_cpu() && weight.dim() >= 2;
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
    }
    p += members;
  }
  TORCH_CHECK_VALUE(p == count, "members must add up to ", count, " parameters, got ", p);
  check_length("roots", given.roots.size(), rooted);
}

// A weight, or what is shaped like it, as [O, I], or of several groups [groups, O, I].
at::Tensor as_rows(const at::Tensor& value, int64_t kind, int64_t groups) {
  if (kind == kColumns) return value.t();
  return groups == 1 ? value.view({value.size(0), -1}) : value.view({groups, value.size(0) / groups, -1});
}

// A bias, or what is shaped like it, as [O, 1], or of several groups [groups, O, 1].
at::Tensor as_column(const at::Tensor& value, int64_t groups) {
  return (groups == 1 ? value : value.view({groups, -1})).unsqueeze(-1);
}

// out <- kept out + a b, matrices or batches of them; with kept = 0 out is not read.
void add_product_(at::Tensor out, double kept, const at::Tensor& a, const at::Tensor& b) {
  if (out.dim() == 2) {
    at::addmm_out(out, out, a, b, kept, 1);
  } else {
    at::baddbmm_out(out, out, a, b, kept, 1);
  }
}

// A weight, or what is shaped like it, with the bias beside it where there is one; what is kept of each.
struct Pair {
  at::Tensor rows, column{};
  double kept = 0, kept_column = 0;
};

// out <- kept out + values root, block by block; root [n, b, b] or [groups, n, b, b].
void add_root_product_(const Pair& out, const Pair& values, const at::Tensor& root) {
  const int64_t inputs = out.rows.size(-1), blocks = root.size(-3);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = block_begin(inputs, blocks, i), size = block_begin(inputs, blocks, i + 1) - begin;
    const at::Tensor square = root.select(-3, i), top = square.narrow(-2, 0, size);
    at::Tensor part = out.rows.narrow(-1, begin, size);
    const at::Tensor own = values.rows.narrow(-1, begin, size);
    add_product_(part, out.kept, own, top.narrow(-1, 0, size));
    if (out.column.defined() && i == blocks - 1) {
      const at::Tensor last = square.narrow(-2, size, 1);
      part.addcmul_(values.column, last.narrow(-1, 0, size));
      at::Tensor column = out.column;
      add_product_(column, out.kept_column, own, top.narrow(-1, size, 1));
      column.addcmul_(values.column, last.narrow(-1, size, 1));
    }
  }
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

// Applies the rule to the entries of one parameter, on several threads where it is large.
template <typename Rule>
void apply_to(const Rule& rule, const at::Tensor& change, const at::Tensor* first, const at::Tensor* second) {
  AT_DISPATCH_FLOATING_TYPES(change.scalar_type(), "apply_to", [&] {
    scalar_t* own = change.mutable_data_ptr<scalar_t>();
    scalar_t* one = first == nullptr ? nullptr : first->mutable_data_ptr<scalar_t>();
    scalar_t* other = second == nullptr ? nullptr : second->mutable_data_ptr<scalar_t>();
    at::parallel_for(0, change.numel(), kGrain, [&](int64_t begin, int64_t end) {
      const auto from = [&](scalar_t* moments) { return moments == nullptr ? nullptr : moments + begin; };
      apply(rule, end - begin, own + begin, from(one), from(other));
    });
  });
}

// Takes the steps of all parameters; rule_of(p) is that of one.
template <typename RuleOf>
void step_all(const Arguments& given, int64_t moments, bool counted, const RuleOf& rule_of) {
  check(given, moments, counted);
  if (given.parameters.empty()) return;
  const PlainKernelGuard guard;
  const auto turn = [&](size_t p, const at::Tensor& change) {
    apply_to(rule_of(p), change, moments > 0 ? &given.first[p] : nullptr, moments > 1 ? &given.second[p] : nullptr);
  };
  int64_t most = 0;
  for (const at::Tensor& parameter : given.parameters) most = std::max(most, parameter.numel());
  const at::Tensor room = at::empty({most}, given.parameters[0].options());
  size_t p = 0, rooted = 0;
  for (size_t i = 0; i < given.kinds.size(); ++i) {
    const int64_t kind = given.kinds[i];
    at::Tensor weight = given.parameters[p];
    const double kept = given.kept[p];
    const at::Tensor gradient = with_decay(given, p);
    at::Tensor change = room.narrow(0, 0, weight.numel()).view(weight.sizes());
    if (kind == kPlain) {
      change.copy_(gradient);
      turn(p, change);
      if (kept != 1) weight.mul_(kept);
      weight.add_(change);
    } else if (kind == kDiagonal) {
      const at::Tensor root = given.roots[rooted++].unsqueeze(-1);
      at::mul_out(change, gradient, root);
      turn(p, change);
      if (kept != 1) weight.mul_(kept);
      weight.addcmul_(change, root);
    } else {
      const at::Tensor& whole = given.roots[rooted++];
      const int64_t groups = whole.size(0);
      const at::Tensor root = groups == 1 ? whole[0] : whole;
      Pair own{as_rows(weight, kind, groups), {}, kept, 1}, seen{as_rows(gradient, kind, groups)};
      Pair wanted{as_rows(change, kind, groups)};
      at::Tensor bias_change;
      if (given.members[i] == 2) {
        bias_change = at::empty_like(given.parameters[p + 1]);
        own.column = as_column(given.parameters[p + 1], groups);
        own.kept_column = given.kept[p + 1];
        seen.column = as_column(with_decay(given, p + 1), groups);
        wanted.column = as_column(bias_change, groups);
      }
      add_root_product_(wanted, seen, root);
      turn(p, change);
      if (bias_change.defined()) turn(p + 1, bias_change);
      add_root_product_(own, wanted, root.mT());
    }
    for (const size_t end = p + given.members[i]; p < end; ++p) {
      given.parameters[p].unsafeGetTensorImpl()->bump_version();
      if (counted) at::Tensor(given.counts[p]).fill_(steps_after(given.counts[p]));
    }
  }
}

}  // namespace

void sgd_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList buffers, at::TensorList roots,
    at::IntArrayRef kinds, at::IntArrayRef members, at::ArrayRef<double> kept, at::ArrayRef<double> coupled,
    at::ArrayRef<double> rates, double momentum, double dampening, bool nesterov) {
  const Arguments given{parameters, gradients, buffers, {}, {}, roots, kinds, members, kept, coupled, rates};
  step_all(given, momentum != 0, false, [&](size_t p) { return Sgd{rates[p], momentum, dampening, nesterov}; });
}

void rmsprop_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList squares, at::TensorList buffers,
    at::TensorList counts, at::TensorList roots, at::IntArrayRef kinds, at::IntArrayRef members,
    at::ArrayRef<double> kept, at::ArrayRef<double> coupled, at::ArrayRef<double> rates, double alpha, double momentum,
    double epsilon) {
  const Arguments given{parameters, gradients, squares, buffers, counts, roots, kinds, members, kept, coupled, rates};
  step_all(given, 1 + (momentum > 0), true, [&](size_t p) { return Rmsprop{rates[p], alpha, momentum, epsilon}; });
}

void adam_step_(
    at::TensorList parameters, at::TensorList gradients, at::TensorList means, at::TensorList squares,
    at::TensorList counts, at::TensorList roots, at::IntArrayRef kinds, at::IntArrayRef members,
    at::ArrayRef<double> kept, at::ArrayRef<double> coupled, at::ArrayRef<double> rates, double beta1, double beta2,
    double epsilon) {
  const Arguments given{parameters, gradients, means, squares, counts, roots, kinds, members, kept, coupled, rates};
  step_all(given, 2, true, [&](size_t p) {
    const double steps = steps_after(counts[p]);
    const double first = 1 - std::pow(beta1, steps), second = 1 - std::pow(beta2, steps);
    return Adam{rates[p] / first, 1 / std::sqrt(second), beta1, beta2, epsilon};
  });
}

}  // namespace consequentialism::cpu

TORCH_LIBRARY_IMPL(consequentialism, CPU, m) {
  m.impl("sgd_step_", consequentialism::cpu::sgd_step_);
  m.impl("rmsprop_step_", consequentialism::cpu::rmsprop_step_);
  m.impl("adam_step_", consequentialism::cpu::adam_step_);
}
