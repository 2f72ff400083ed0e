// Launcher of products with a root. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "root_product.h"
#include "types.h"

namespace consequentialism::cuda {

// Matrices whose rows are contiguous: elements from row to row, and from matrix to matrix.
struct MatrixStrides {
  int64_t row;
  int64_t matrix;
};

// What the product goes to, [batch, rows, order]: of the root's type or, `narrow`, of the rows'; where `adds` it is
// read before.
struct ProductOutput {
  void* data;
  MatrixStrides strides;
  bool narrow;
  bool adds;
};

// out <- alpha rows S, plus out where it adds. rows are [batch, rows, order], S [batch, order, order] is symmetric;
// all three are at least 1. plan = plan_root_product(...).
template <class T, class G>
cudaError_t launch_root_product(
    const T* rows, MatrixStrides row_strides, const G* root, MatrixStrides root_strides, const RootProductShape& shape,
    double alpha, const ProductOutput& out, const RootProductPlan& plan, cudaStream_t stream);

}  // namespace consequentialism::cuda
