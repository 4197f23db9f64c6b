"""SOURCE of the kernels: one step of AdamW or of SGD over many tensors, which leaves the previous state behind.

Each element is read once and written once: parameter and moments come in, the old parameter goes to its past, the new
one to where it was, the new moments to the other set. Where moments may not change their place, the old ones go to the
other set instead.

The arithmetic is that of torch's fused kernels, operation for operation (`fused_adam_utils.cuh` and `FusedSgdKernel.cu`
of torch 2.11). Every rounding is written out, so that no compiler can contract two operations into another result.
Both compute in float32, with scalars rounded to float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("tolaria")

THREADS = 256
CHUNK: int = 4096
"""Elements that one block of threads works on: 16 KiB of each tensor in float32."""

UNROLL: int = 4
"""Vectors of 16 bytes of each tensor that a thread has under way at once."""

FIXED_COLUMNS = 4
"""Columns of a table before those of moments and pasts: first chunk, elements, parameter, step."""

MAXIMIZE, SCALED, FOUND, STORE, FIRST, NESTEROV, RATE = 1, 2, 4, 8, 16, 32, 64
"""What a launch is told, as bits: gradients are to be negated; to be divided by a scale; there is a flag that refuses
the step; moments stay where they are; there are no moments yet; Nesterov's momentum; the rate is on the device."""

KERNEL_DEVICES = {"cuda"}
"""Kinds of devices that the kernels run on."""

_TYPES = {torch.float32: "float", torch.bfloat16: "BFloat", torch.float16: "Half"}
DTYPES = frozenset(_TYPES)
"""Element types of parameters and moments that the kernels know."""

_TYPES_SOURCE = """
typedef long long i64;
struct Half { unsigned short bits; };
struct BFloat { unsigned short bits; };
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(BFloat x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float wide(Half x) {
  float wider;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wider) : "h"(x.bits));
  return wider;
}
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(Half& to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(BFloat& to, float x) {
  // to the nearest, ties to even; every NaN becomes one of them
  const unsigned bits = __float_as_uint(x);
  to.bits = x != x ? 0x7FFF : (unsigned short)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
"""

_PREPARE = (
    f"#define THREADS {THREADS}"
    + """
typedef long long i64;
// once per launch: the steps counted, the former count kept, bias corrections worked out
extern "C" __global__ void __launch_bounds__(THREADS)
tolaria_prepare(const i64* table, int entries, int what, const float* found, float* past, float* bias, i64* launches,
                double beta1, double beta2) {
  const int e = blockIdx.x * THREADS + threadIdx.x;
  if (e == 0) *launches += 1;
  if (e >= entries) return;
  float* step = (float*)table[3 * entries + e];
  if (!step) return;
  const float before = *step;
  const float now = (what & 4) && *found == 1.0f ? before : before + 1.0f;
  past[e] = before;
  *step = now;
  bias[2 * e] = 1.0f - powf((float)beta1, now);
  bias[2 * e + 1] = __fsqrt_rn(1.0f - powf((float)beta2, now));
}
"""
)

_COMMON = """
#define VECTOR (16 / (int)sizeof(P))
template <typename T> struct alignas(sizeof(T) * VECTOR < 16 ? sizeof(T) * VECTOR : 16) Pack { T x[VECTOR]; };
struct Place {
  P *parameter, *past;
  P* gradient;
  S *read[MOMENTS + 1], *write[MOMENTS + 1], *keep[MOMENTS + 1];
};

__device__ __forceinline__ void step_of_one(float& p, float& g, float* m, const Scalars& s, int lane);

template <int N, typename T> __device__ __forceinline__ void copy_in(Pack<T>* to, const T* from, int q) {
#pragma unroll
  for (int u = 0; u < N; ++u) to[u] = ((const Pack<T>*)from)[q + u * THREADS];
}

// N vectors of one thread, THREADS vectors apart: everything is under way before anything is used
template <int N> __device__ __forceinline__ void step_of_vectors(const Place& at, int q, const Scalars& s) {
  Pack<P> p[N], g[N];
  Pack<S> m[MOMENTS + 1][N];
  copy_in<N>(p, at.parameter, q);
  copy_in<N>(g, at.gradient, q);
#pragma unroll
  for (int k = 0; k < MOMENTS; ++k)
    if (!s.first) copy_in<N>(m[k], at.read[k], q);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const int w = q + u * THREADS;
    ((Pack<P>*)at.past)[w] = p[u];
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k)
      if (s.store && !s.first) ((Pack<S>*)at.keep[k])[w] = m[k][u];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      float x = wide(p[u].x[i]), y = wide(g[u].x[i]), z[MOMENTS + 1];
#pragma unroll
      for (int k = 0; k < MOMENTS; ++k) z[k] = s.first ? 0.0f : wide(m[k][u].x[i]);
      step_of_one(x, y, z, s, i & 3);
      narrow(p[u].x[i], x);
      narrow(g[u].x[i], y);
#pragma unroll
      for (int k = 0; k < MOMENTS; ++k) narrow(m[k][u].x[i], z[k]);
    }
    ((Pack<P>*)at.parameter)[w] = p[u];
    if (s.scaled) ((Pack<P>*)at.gradient)[w] = g[u];
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) ((Pack<S>*)at.write[k])[w] = m[k][u];
  }
}

__device__ __forceinline__ void step_of_element(const Place& at, int i, const Scalars& s) {
  const P before = at.parameter[i];
  float x = wide(before), y = wide(at.gradient[i]), z[MOMENTS + 1];
  at.past[i] = before;
#pragma unroll
  for (int k = 0; k < MOMENTS; ++k) {
    z[k] = 0.0f;
    if (!s.first) {
      const S moment = at.read[k][i];
      if (s.store) at.keep[k][i] = moment;
      z[k] = wide(moment);
    }
  }
  step_of_one(x, y, z, s, i & 3);
  narrow(at.parameter[i], x);
  if (s.scaled) narrow(at.gradient[i], y);
#pragma unroll
  for (int k = 0; k < MOMENTS; ++k) narrow(at.write[k][i], z[k]);
}

// a refused step: nothing changes, and what is left behind is what is there
__device__ void stay(const Place& at, int size, const Scalars& s) {
  for (int i = threadIdx.x; i < size; i += THREADS) {
    at.past[i] = at.parameter[i];
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) {
      if (s.first) narrow(at.write[k][i], 0.0f);
      else if (s.store) at.keep[k][i] = at.read[k][i];
      else at.write[k][i] = at.read[k][i];
    }
  }
}

__device__ void step_of_chunk(const i64* table, const i64* gradients, int entries, int columns, int from, int to,
                              int past, int e, Scalars& s, bool refused) {
  const int chunk = blockIdx.x;
  const i64 start = (i64)(chunk - (int)table[e]) * CHUNK, left = table[entries + e] - start;
  const int size = left < CHUNK ? (int)left : CHUNK;
  Place at;
  at.parameter = (P*)table[2 * entries + e] + start;
  at.gradient = (P*)gradients[e] + start;
  at.past = (P*)table[past * entries + e] + start;
  size_t bits = (size_t)at.parameter | (size_t)at.gradient, theirs = bits;  // torch keeps no past
  bits |= (size_t)at.past;
#pragma unroll
  for (int k = 0; k < MOMENTS; ++k) {
    S* here = (S*)table[(from + k) * entries + e] + start;
    S* there = (S*)table[(to + k) * entries + e] + start;
    at.read[k] = here;
    at.write[k] = s.store ? here : there;
    at.keep[k] = there;
    bits |= (size_t)here | (size_t)there;
    theirs |= (size_t)here;
  }
  s.aligned = table[entries + e] % 4 == 0 && theirs % (4 * sizeof(P)) == 0;  // as torch steps four at a time
  if (refused) {
    stay(at, size, s);
    return;
  }
  int done = 0;
  if ((bits & 15) == 0) {
    const int vectors = size / VECTOR;
    int q = threadIdx.x;
    for (; q + (UNROLL - 1) * THREADS < vectors; q += UNROLL * THREADS) step_of_vectors<UNROLL>(at, q, s);
    for (; q < vectors; q += THREADS) step_of_vectors<1>(at, q, s);
    done = vectors * VECTOR;
  }
  for (int i = done + threadIdx.x; i < size; i += THREADS) step_of_element(at, i, s);
}
"""

_ADAMW = (
    """
struct Scalars {
  float rate_times_decay, step_size, beta1, beta2, root, eps, scale;
  bool decays, negative, scaled, store, first, aligned;
};
""",
    """
__device__ __forceinline__ void step_of_one(float& p, float& g, float* m, const Scalars& s, int lane) {
  if (s.scaled) g = __fdiv_rn(g, s.scale);
  const float d = s.negative ? -g : g;
  if (s.decays) p = __fmaf_rn(-s.rate_times_decay, p, p);
  m[0] = __fmaf_rn(s.beta1, m[0], __fmaf_rn(-s.beta1, d, d));
  const float square = __fmul_rn(d, d);
  m[1] = __fmaf_rn(s.beta2, m[1], __fmaf_rn(-s.beta2, square, square));
#if MOMENTS == 3
  m[2] = m[2] < m[1] ? m[1] : m[2];
#endif
  const float root = __fdiv_rn(__fsqrt_rn(m[MOMENTS - 1]), s.root);
  p = __fsub_rn(p, __fdiv_rn(__fmul_rn(s.step_size, m[0]), __fadd_rn(root, s.eps)));
}

extern "C" __global__ void __launch_bounds__(THREADS)
tolaria_adamw(const i64* table, const i64* gradients, int entries, int columns, int from, int to, int past, int what,
              const float* bias, const float* rate_at, const float* scale_at, const float* found, double rate,
              double beta1, double beta2, double decay, double eps) {
  const int e = ((const int*)(table + (i64)columns * entries))[blockIdx.x];
  const float lr = what & 64 ? *rate_at : (float)rate;
  Scalars s;
  s.rate_times_decay = __fmul_rn(lr, (float)decay);
  s.step_size = __fdiv_rn(lr, bias[2 * e]);
  s.beta1 = (float)beta1;
  s.beta2 = (float)beta2;
  s.root = bias[2 * e + 1];
  s.eps = (float)eps;
  s.scaled = what & 2;
  s.scale = s.scaled ? *scale_at : 1.0f;
  s.decays = (float)decay != 0.0f;
  s.negative = what & 1;
  s.store = what & 8;
  s.first = false;
  step_of_chunk(table, gradients, entries, columns, from, to, past, e, s, (what & 4) && *found == 1.0f);
}
""",
)

# Which of two products a sum is fused with is the compiler's choice in torch's kernel, not written in its source. Read
# from its machine code (torch 2.11, CUDA 13.0): for compute capabilities below 10 it chooses otherwise in two cases.
_SGD = (
    """
#define OLD (__CUDA_ARCH__ < 1000)
struct Scalars {
  float rate, momentum, share, decay, scale;
  bool decays, negative, scaled, store, first, nesterov, aligned;
};
""",
    """
__device__ __forceinline__ void step_of_one(float& p, float& g, float* m, const Scalars& s, int lane) {
  if (s.scaled) g = __fdiv_rn(g, s.scale);
  float d = s.negative ? -g : g;
  if (s.decays) d = __fmaf_rn(s.decay, p, d);
#if MOMENTS == 1
  float buffer = d;
  if (!s.first) {
    const bool other = OLD && s.aligned && s.negative && !s.scaled && !s.decays;
    buffer = other ? __fmaf_rn(s.momentum, m[0], __fmul_rn(s.share, d))
                   : __fmaf_rn(s.share, d, __fmul_rn(s.momentum, m[0]));
  }
  m[0] = buffer;
  d = s.nesterov ? __fmaf_rn(s.momentum, buffer, d) : buffer;
#endif
  const bool apart = OLD && sizeof(P) == 4 && s.aligned && s.scaled && lane != 3;
  p = apart ? __fsub_rn(p, __fmul_rn(s.rate, d)) : __fmaf_rn(-s.rate, d, p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
tolaria_sgd(const i64* table, const i64* gradients, int entries, int columns, int from, int to, int past, int what,
            const float* rate_at, const float* scale_at, const float* found, double rate, double momentum,
            double dampening, double decay) {
  const int e = ((const int*)(table + (i64)columns * entries))[blockIdx.x];
  Scalars s;
  s.rate = what & 64 ? *rate_at : (float)rate;
  s.momentum = (float)momentum;
  s.share = __fsub_rn(1.0f, (float)dampening);
  s.decay = (float)decay;
  s.decays = s.decay != 0.0f;
  s.scaled = what & 2;
  s.scale = s.scaled ? *scale_at : 1.0f;
  s.negative = what & 1;
  s.store = what & 8;
  s.first = what & 16;
  s.nesterov = what & 32;
  step_of_chunk(table, gradients, entries, columns, from, to, past, e, s, (what & 4) && *found == 1.0f);
}
""",
)

_PIECES = {"tolaria_adamw": _ADAMW, "tolaria_sgd": _SGD}


def text(kernel: str, parameter: torch.dtype, moment: torch.dtype, num_moments: int) -> str:
    """The CUDA source of one kernel for these element types."""
    return _text(kernel, parameter, moment, num_moments, CHUNK, UNROLL)


@functools.cache  # asked for at each step; the same object has its hash at hand
def _text(kernel: str, parameter: torch.dtype, moment: torch.dtype, num_moments: int, chunk: int, unroll: int) -> str:
    scalars, step = _PIECES[kernel]
    head = f"#define P {_TYPES[parameter]}\n#define S {_TYPES[moment]}\n#define MOMENTS {num_moments}\n"
    sizes = f"#define THREADS {THREADS}\n#define CHUNK {chunk}\n#define UNROLL {unroll}\n"
    return f"{_TYPES_SOURCE}{head}{sizes}{scalars}{_COMMON}{step}"


def compiled(
    index: int, kernel: str, parameter: torch.dtype, moment: torch.dtype, num_moments: int
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The kernel and `tolaria_prepare` for that device, which must be current; compiled on first use (a second).

    None where that is impossible, which is logged. One for each device: a kernel belongs to the context that it was
    loaded in. Must not be called for the first time while any thread captures a graph.
    """
    step = _compile(index, text(kernel, parameter, moment, num_moments), kernel)
    prepare = _compile(index, _PREPARE, "tolaria_prepare")
    return None if step is None or prepare is None else (step, prepare)


@functools.cache
def _compile(index: int, source: str, name: str) -> Callable[..., Any] | None:
    try:
        kernel: Callable[..., Any] = torch.cuda._compile_kernel(source, name)
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        logger.info("optimizer steps use plain torch operators: %s: %s", type(error).__name__, error)
        return None
    return kernel
