"""Products of float32 matrices in compiled graphs on CPUs, by blocks, with little around them.

A call of torch's own product makes some two hundred allocations before it multiplies, which takes
longer than small products do. Here each thread copies what it needs of a matrix that lies by
columns, so that none waits for what another has just written, and multiplies block by block with
oneDNN's microkernel, as torch's attention on CPUs does.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from .precision import products_are_float32

MM = torch.ops.aten.mm.default

SOURCE = r"""
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <algorithm>
#include <atomic>

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

constexpr int64_t SIZE = 1 << 17;  // numbers of a block of A, at most: half a megabyte
constexpr int64_t COLUMNS = 32;    // of a block of B, at most
constexpr int64_t DEPTH = 1024;    // columns of a block of A, and rows of one of B, at most

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

// C = A B, or its transpose where turned, by rows; false where a thread failed
inline bool multiply(const Matrix& a, const Matrix& b, float* c, bool turned) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t M = a.rows, K = a.columns, N = b.columns;
  const int64_t a_stride = a.stride(), b_stride = b.stride();
  const bool copy_a = !a.by_rows(), copy_b = !b.by_rows();
  // threads share out first the rows, or columns, that are copied
  const bool rows_first = copy_a || !copy_b;
  const int64_t first = std::min(threads, divided_up(rows_first ? M : N, COLUMNS));
  const int64_t second = std::min(threads / first, divided_up(rows_first ? N : M, COLUMNS));
  const int64_t row_parts = rows_first ? first : second, column_parts = rows_first ? second : first;
  const int64_t rows = divided_up(M, row_parts);
  const int64_t columns = divided_up(divided_up(N, column_parts), 16) * 16;
  const int64_t depth = divided_up(K, divided_up(K, DEPTH));
  const int64_t least_depth = SIZE / DEPTH;  // so that blocks have DEPTH rows at most
  const int64_t height = divided_up(rows, divided_up(rows * std::max(depth, least_depth), SIZE));
  std::atomic<bool> done{true};
#pragma omp parallel for num_threads(threads)
  for (int64_t part = 0; part < row_parts * column_parts; part++) {
    alignas(64) static thread_local float of_a[SIZE + DEPTH];
    alignas(64) static thread_local float of_b[DEPTH * COLUMNS], of_c[DEPTH * COLUMNS];
    const int64_t m0 = part / column_parts * rows, m1 = std::min(M, m0 + rows);
    const int64_t n0 = part % column_parts * columns, n1 = std::min(N, n0 + columns);
    try {
      for (int64_t k0 = 0; k0 < K; k0 += depth) {
        const int64_t k = std::min(depth, K - k0);
        auto copy_of_a = [&](int64_t i) {
          transpose(a.data + k0 * a_stride + i, a_stride, of_a, k, k, std::min(height, m1 - i));
        };
        auto copy_of_b = [&](int64_t j) {
          const int64_t n = std::min(COLUMNS, n1 - j);
          transpose(b.data + j * b_stride + k0, b_stride, of_b, COLUMNS, n, k);
        };
        auto block = [&](int64_t i, int64_t j) {
          const int64_t m = std::min(height, m1 - i), n = std::min(COLUMNS, n1 - j);
          at::native::cpublas::brgemm(
              m, n, k, copy_a ? k : a_stride, copy_b ? COLUMNS : b_stride, turned ? COLUMNS : N,
              k0 > 0, copy_a ? of_a : a.data + i * a_stride + k0,
              copy_b ? of_b : b.data + k0 * b_stride + j, turned ? of_c : c + i * N + j, false);
          if (turned) transpose(of_c, COLUMNS, c + j * M + i, M, m, n);
        };
        if (copy_a) {
          for (int64_t i = m0; i < m1; i += height) {
            copy_of_a(i);
            for (int64_t j = n0; j < n1; j += COLUMNS) {
              if (copy_b) copy_of_b(j);
              block(i, j);
            }
          }
        } else {
          for (int64_t j = n0; j < n1; j += COLUMNS) {
            if (copy_b) copy_of_b(j);
            for (int64_t i = m0; i < m1; i += height) block(i, j);
          }
        }
      }
    } catch (...) {  // must not leave the region
      done = false;
    }
  }
  return done;
}

inline void product(const Matrix& a, const Matrix& b, float* c) {
  const bool regular = (a.by_rows() || a.by_columns()) && (b.by_rows() || b.by_columns());
  const bool empty = a.rows == 0 || a.columns == 0 || b.columns == 0;
  if (regular && !empty && at::globalContext().userEnabledMkldnn()) {
    // as C' = B' A' where less is copied so; a block of that is not added to, but complete
    const bool turned = !b.by_rows() && (!a.by_rows() || a.rows < b.columns) && a.columns <= DEPTH;
    const Matrix left = turned ? b.transposed() : a;
    const Matrix right = turned ? a.transposed() : b;
    if (multiply(left, right, c, turned)) return;
  }
  const Matrix result{c, a.rows, b.columns, b.columns, 1};
  AOTI_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(result.tensor().get(), a.tensor().get(), b.tensor().get()));
}

}  // namespace probae
"""


@contextlib.contextmanager
def by_blocks() -> Iterator[None]:
    """Let Inductor multiply float32 matrices on CPUs by the source above.

    Not where there is no microkernel, nor where a user has chosen a lower precision for torch.
    """
    if not (has_microkernel() and products_are_float32()):
        yield
        return
    usual = lowerings[MM]

    def lowered(a: Any, b: Any, **keywords: Any) -> Any:
        if not keywords and V.graph.cpp_wrapper and _can_multiply(a) and _can_multiply(b):
            return Product.of(a, b)
        return usual(a, b, **keywords)

    # the configuration is part of the key of Inductor's cache
    version = {"probae.products": sha256(Path(__file__).read_bytes()).hexdigest()}
    metadata = {"aot_inductor.metadata": {**config.aot_inductor.metadata, **version}}
    lowerings[MM] = lowered
    try:
        with config.patch(metadata):
            yield
    finally:
        lowerings[MM] = usual


@cache
def has_microkernel() -> bool:
    """Whether torch's oneDNN has the microkernel on this chip, for float32."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "native" / "CPUBlas.h"
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and torch.backends.mkldnn.is_available()
        and header.exists()
        and "CPUBLAS_BRGEMM_F32F32F32" in header.read_text()  # not in older torch
    )


def _can_multiply(matrix: Any) -> bool:
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
        wrapper.writeline(f"probae::product({a}, {b}, {_data(self)});")


def _matrix(matrix: Any) -> str:
    numbers = ", ".join(map(str, (*matrix.get_size(), *matrix.get_stride())))
    return f"probae::Matrix{{{_data(matrix)}, {numbers}}}"


def _data(matrix: Any) -> str:
    return f"(float*)({matrix.get_name()}.data_ptr()) + {matrix.get_layout().offset}"
