"""Products of float32 matrices in compiled graphs on CPUs, by blocks, with next to nothing around.

A call of torch's own product makes some two hundred small things in memory before it multiplies,
which takes longer than small products do. Here each thread lays out anew what it needs of a
transposed matrix, so that none reads what another has just written, and multiplies block by block
with oneDNN's microkernel, as torch's attention on CPUs does. Where there is none, torch multiplies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from hashlib import sha256
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from .precision import products_are_float32

MM = torch.ops.aten.mm.default

SOURCE = r"""
#include <ATen/Context.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <algorithm>

namespace probae {

struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;

  bool by_rows() const {
    return (columns == 1 || column_stride == 1) && (rows == 1 || row_stride >= columns);
  }
  bool by_columns() const { return transposed().by_rows(); }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  // from a row to the next, or, of a matrix by columns, from a column to the next
  int64_t stride() const {
    if (!by_rows()) return transposed().stride();
    return rows == 1 ? columns : row_stride;
  }
  torch::aot_inductor::RAIIAtenTensorHandle tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle handle;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<float*>(data), 2, sizes, strides, 0, aoti_torch_dtype_float32(),
        aoti_torch_device_type_cpu(), 0, &handle));
    return torch::aot_inductor::RAIIAtenTensorHandle(handle);
  }
};

#ifdef CPUBLAS_BRGEMM_F32F32F32
// of blocks at most: numbers of A, which fit in L2; columns of B; and numbers summed at once
constexpr int64_t SIZE = 1 << 17, COLUMNS = 32, DEPTH = 1024;

inline bool has_microkernel() {
  static const bool there = [] {
    const float a = 2, b = 3;
    float c = 0;
    try {
      at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &a, &b, &c, false);
      at::native::cpublas::brgemm_release(false);
    } catch (const std::exception&) {
    }
    return c == 6;
  }();
  return there && at::globalContext().userEnabledMkldnn();
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void transpose(
    const float* from, int64_t from_stride, float* to, int64_t to_stride,
    int64_t rows, int64_t columns) {
  constexpr int64_t SIDE = 16;
  for (int64_t i = 0; i < rows; i += SIDE) {
    for (int64_t j = 0; j < columns; j += SIDE) {
      const float* source = from + i * from_stride + j;
      float* target = to + j * to_stride + i;
      const int64_t m = std::min(SIDE, rows - i), n = std::min(SIDE, columns - j);
#ifdef CPU_CAPABILITY_AVX512
      if (m == SIDE && n == SIDE) {
        at::vec::transpose_mxn<float, SIDE, SIDE>(source, from_stride, target, to_stride);
        continue;
      }
#endif
      for (int64_t k = 0; k < m; k++)
        for (int64_t l = 0; l < n; l++) target[l * to_stride + k] = source[k * from_stride + l];
    }
  }
}

// C = A B, or its transpose where turned, by rows
inline void multiply(const Matrix& a, const Matrix& b, float* c, bool turned, int64_t threads) {
  const int64_t M = a.rows, K = a.columns, N = b.columns;
  const int64_t a_stride = a.stride(), b_stride = b.stride();
  const bool turn_a = !a.by_rows(), turn_b = !b.by_rows();
  // whoever lays out rows of A anew is the one to need them; so with columns of B
  const bool by_rows = turn_a || !turn_b;
  const int64_t first = std::min(threads, divided_up(by_rows ? M : N, COLUMNS));
  const int64_t second = std::min(threads / first, divided_up(by_rows ? N : M, COLUMNS));
  const int64_t row_parts = by_rows ? first : second, column_parts = by_rows ? second : first;
  const int64_t rows = divided_up(M, row_parts);
  const int64_t columns = divided_up(divided_up(N, column_parts), 16) * 16;
  const int64_t depth = divided_up(K, divided_up(K, DEPTH));
  const int64_t least = SIZE / DEPTH;  // so that a block has DEPTH rows at most
  const int64_t height = divided_up(rows, divided_up(rows * std::max(depth, least), SIZE));
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < row_parts * column_parts; part++) {
    alignas(64) static thread_local float of_a[SIZE + DEPTH];
    alignas(64) static thread_local float of_b[DEPTH * COLUMNS], of_c[DEPTH * COLUMNS];
    const int64_t m0 = part / column_parts * rows, m1 = std::min(M, m0 + rows);
    const int64_t n0 = part % column_parts * columns, n1 = std::min(N, n0 + columns);
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t k = std::min(depth, K - k0);
      auto lay_out_a = [&](int64_t i) {
        transpose(a.data + k0 * a_stride + i, a_stride, of_a, k, k, std::min(height, m1 - i));
      };
      auto lay_out_b = [&](int64_t j) {
        const int64_t n = std::min(COLUMNS, n1 - j);
        transpose(b.data + j * b_stride + k0, b_stride, of_b, COLUMNS, n, k);
      };
      auto block = [&](int64_t i, int64_t j) {
        const int64_t m = std::min(height, m1 - i), n = std::min(COLUMNS, n1 - j);
        at::native::cpublas::brgemm(
            m, n, k, turn_a ? k : a_stride, turn_b ? COLUMNS : b_stride, turned ? COLUMNS : N,
            k0 > 0, turn_a ? of_a : a.data + i * a_stride + k0,
            turn_b ? of_b : b.data + k0 * b_stride + j, turned ? of_c : c + i * N + j, false);
        if (turned) transpose(of_c, COLUMNS, c + j * M + i, M, m, n);
      };
      if (turn_a) {
        for (int64_t i = m0; i < m1; i += height) {
          lay_out_a(i);
          for (int64_t j = n0; j < n1; j += COLUMNS) {
            if (turn_b) lay_out_b(j);
            block(i, j);
          }
        }
      } else {
        for (int64_t j = n0; j < n1; j += COLUMNS) {
          if (turn_b) lay_out_b(j);
          for (int64_t i = m0; i < m1; i += height) block(i, j);
        }
      }
    }
    at::native::cpublas::brgemm_release(false);
  }
}
#else
inline bool has_microkernel() { return false; }
constexpr int64_t DEPTH = 0;
inline void multiply(const Matrix&, const Matrix&, float*, bool, int64_t) {}
#endif

inline void product(const Matrix& a, const Matrix& b, float* c, int64_t threads) {
  const bool regular = (a.by_rows() || a.by_columns()) && (b.by_rows() || b.by_columns());
  const bool empty = a.rows == 0 || a.columns == 0 || b.columns == 0;
  if (regular && !empty && has_microkernel()) {
    // as C' = B' A' where that leaves less to lay out anew, of a block all at once
    const bool turned = !b.by_rows() && (!a.by_rows() || a.rows < b.columns) && a.columns <= DEPTH;
    if (turned) {
      multiply(b.transposed(), a.transposed(), c, true, threads);
    } else {
      multiply(a, b, c, false, threads);
    }
  } else {
    const Matrix result{c, a.rows, b.columns, b.columns, 1};
    AOTI_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_mm_out(result.tensor().get(), a.tensor().get(), b.tensor().get()));
  }
}

}  // namespace probae
"""


@contextlib.contextmanager
def by_blocks() -> Iterator[None]:
    """Let Inductor multiply float32 matrices on CPUs by the source above.

    Not where a user has chosen a lower precision of torch's own products.
    """
    if not products_are_float32():
        yield
        return
    usual = lowerings[MM]

    def lowered(a: Any, b: Any, **keywords: Any) -> Any:
        if not keywords and V.graph.cpp_wrapper and _is_ours(a) and _is_ours(b):
            return Product.of(a, b)
        return usual(a, b, **keywords)

    # the configuration is part of the key of Inductor's cache
    version = {"probae.products": sha256(SOURCE.encode()).hexdigest()}
    with (
        config.patch({"aot_inductor.metadata": version}),
        mock.patch.dict(lowerings, {MM: lowered}),
    ):
        yield


def _is_ours(matrix: Any) -> bool:
    on_cpu = matrix.get_device().type == "cpu" and matrix.get_dtype() == torch.float32
    return on_cpu and all(getattr(n, "is_number", True) for n in matrix.get_size())


class Product(ir.ExternKernelOut):
    """A call of the source above, among the calls of a graph's kernels."""

    @classmethod
    def of(cls, a: Any, b: Any) -> Any:
        """Return the product of two matrices."""
        a, b = (ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(m)) for m in (a, b))
        size = [a.get_size()[0], b.get_size()[1]]
        layout = ir.FixedLayout(a.get_device(), a.get_dtype(), size)
        call = cls(
            layout,
            [a, b],
            python_kernel_name="extern_kernels.mm",
            cpp_kernel_name="at::mm_out",
            op_overload=torch.ops.aten.mm.out,
        )
        return ir.TensorBox.create(call)

    def codegen(self, wrapper: Any) -> None:
        """Write the call."""
        if "namespace probae" not in wrapper.header.getvalue():
            wrapper.header.splice(SOURCE)
            wrapper.needs_vec_isa = True
        a, b = map(_matrix, self.inputs)
        threads = torch.get_num_threads()  # as in the kernels
        wrapper.writeline(f"probae::product({a}, {b}, {_data(self)}, {threads});")


def _matrix(matrix: Any) -> str:
    numbers = ", ".join(map(str, (*matrix.get_size(), *matrix.get_stride())))
    return f"probae::Matrix{{{_data(matrix)}, {numbers}}}"


def _data(matrix: Any) -> str:
    return f"(float*)({matrix.get_name()}.data_ptr()) + {matrix.get_layout().offset}"
