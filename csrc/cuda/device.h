// What the CUDA kernels share: reads of eight at a time, sums over a block in one order, and the launch.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace rlhf_kernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Elements that a thread takes at a time: 16 bytes of the 16-bit types, twice that of float32.
constexpr int kVector = 8;
// The most blocks of a kernel whose blocks loop over the work. Enough to fill the largest GPUs, and the same number on
// every GPU, so that sums have the same bits on all of them.
constexpr int64_t kMostBlocks = 1024;

// 1/x for an x that is not 0 in float32, by Newton's method: a division of doubles is a function call on a GPU, and
// registers spill before it.
__device__ __forceinline__ double inverse(double x) {
  double result = 1.0f / static_cast<float>(x);
#pragma unroll
  for (int i = 0; i < 2; ++i) result = fma(fma(-x, result, 1.0), result, result);
  return result;
}

// 2^x. Results below the normal numbers may come out as 0, which saves three instructions of five.
__device__ __forceinline__ float power_of_two_or_0(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// ------------------------------------------------------------------------------------------------------------ lanes

// Any plain struct from another lane, 32 bits at a time.
template <class T, class Move>
__device__ __forceinline__ T moved(const T& value, Move&& move) {
  static_assert(sizeof(T) % 4 == 0);
  union {
    T whole;
    uint32_t words[sizeof(T) / 4];
  } from{value}, to{value};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) to.words[i] = move(from.words[i]);
  return to.whole;
}

template <class T>
__device__ __forceinline__ T shuffle_up(const T& value, int distance) {
  return moved(value, [&](uint32_t word) { return __shfl_up_sync(kAllLanes, word, distance); });
}

template <class T>
__device__ __forceinline__ T shuffle_down(const T& value, int distance) {
  return moved(value, [&](uint32_t word) { return __shfl_down_sync(kAllLanes, word, distance); });
}

template <class T>
__device__ __forceinline__ T shuffle(const T& value, int lane, int width) {
  return moved(value, [&](uint32_t word) { return __shfl_sync(kAllLanes, word, lane, width); });
}

template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int mask) {
  return moved(value, [&](uint32_t word) { return __shfl_xor_sync(kAllLanes, word, mask); });
}

// Merges the values of all threads into the first thread's, always in the same order. Every thread of the block must call
// it. merge(a, b) takes b into a; `between` needs room for one value per warp.
template <class T, class Merge>
__device__ __forceinline__ T block_merge(T value, T* between, Merge&& merge) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = shuffle_down(value, distance);
    merge(value, other);
  }
  if (threadIdx.x % kWarp == 0) between[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) merge(value, between[warp]);
  }
  __syncthreads();
  return value;
}

// Whether this block is the last of so many to call it with this ticket. If so, it sees all that the others wrote before they
// called it. The ticket must be 0 when the kernel starts.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// ------------------------------------------------------------------------------------------------------------ memory

// Where a sequence, or a prompt's completions, lie. Boundaries are in the GPU's memory, so nobody has checked them: they
// are clamped, and nothing outside the data is read whatever they hold.
struct Span {
  int64_t row, column, flat, length;
};

__device__ __forceinline__ Span span_of(const Sequences& sequences, int64_t b) {
  if (!sequences.boundaries) return {b, 0, b * sequences.length, sequences.length};
  const auto inside = [&](int64_t at, int64_t least) { return at < least ? least : at > sequences.length ? sequences.length : at; };
  const int64_t begin = inside(sequences.boundaries[b], 0), end = inside(sequences.boundaries[b + 1], begin);
  return {0, begin, begin, end - begin};
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float widened(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? float_of_bits(uint32_t{bits} << 16) : __half2float(__ushort_as_half(bits));
}

// Rounds to the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint16_t narrowed(float x, Dtype dtype) {
  if (dtype == Dtype::float16) return __half_as_ushort(__float2half_rn(x));
#if defined(__CUDA_ARCH__)
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
#else
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// Two of them, the first in the low bits: one instruction.
__device__ __forceinline__ uint32_t narrowed(float low, float high, Dtype dtype) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  if (dtype == Dtype::float16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#else
  return narrowed(low, dtype) | uint32_t{narrowed(high, dtype)} << 16;
#endif
}

__device__ __forceinline__ float load(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::float32 ? static_cast<const float*>(data)[at] : widened(static_cast<const uint16_t*>(data)[at], dtype);
}

__device__ __forceinline__ void store(void* data, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[at] = x;
  } else {
    static_cast<uint16_t*>(data)[at] = narrowed(x, dtype);
  }
}

// Tells the emulation (tests/native/cuda_emulation) where 16 bytes are read or written, which a GPU can do at multiples of
// 16 only.
__device__ __forceinline__ void note_access([[maybe_unused]] const void* address) {
#if defined(RLHF_CUDA_EMULATED)
  emulation::note_access(address);
#endif
}

// 16 bytes at once, to or from an address that is a multiple of 16. Written in PTX, since nvcc no longer knows that a
// pointer which was an integer once is to global memory, and cuts some assignments of its vector types into words.
__device__ __forceinline__ uint4 load_16_bytes(const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 result;
  asm("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
      : "l"(__cvta_generic_to_global(from)));
  return result;
#else
  note_access(from);
  return *static_cast<const uint4*>(from);
#endif
}

__device__ __forceinline__ void store_16_bytes(void* to, const uint4& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#else
  note_access(to);
  *static_cast<uint4*>(to) = value;
#endif
}

// Eight elements as they come from memory, not yet converted: first all loads are issued, then all are converted.
struct Packed {
  uint32_t words[kVector];
  bool wide;  // an element in each word, as float32; else two in each of the first four

  __device__ __forceinline__ float of(int i, Dtype dtype) const {
    return wide ? float_of_bits(words[i]) : widened(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))), dtype);
  }

  __device__ __forceinline__ void unpack(Dtype dtype, float (&x)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = of(i, dtype);
  }

  __device__ __forceinline__ void set(int first, const uint4& four) {
    words[first] = four.x;
    words[first + 1] = four.y;
    words[first + 2] = four.z;
    words[first + 3] = four.w;
  }
};

__device__ __forceinline__ bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Eight elements from an address that is a multiple of 16 bytes.
__device__ __forceinline__ Packed fetch_aligned(const void* data, Dtype dtype, int64_t at) {
  Packed result;
  result.wide = dtype == Dtype::float32;
  if (result.wide) {
    result.set(0, load_16_bytes(static_cast<const float*>(data) + at));
    result.set(4, load_16_bytes(static_cast<const float*>(data) + at + 4));
  } else {
    result.set(0, load_16_bytes(static_cast<const uint16_t*>(data) + at));
  }
  return result;
}

// 16 bytes from an address that is only a multiple of 2. Reads the aligned 16 bytes in which they begin and, unless the
// address is a multiple of 16 itself, the next 16.
__device__ __forceinline__ uint4 shifted_16_bytes(const void* from) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  const unsigned shift = address & 15;
  const auto* aligned = static_cast<const char*>(from) - shift;
  uint4 a = load_16_bytes(aligned), b = load_16_bytes(aligned + (shift ? 16 : 0));
  if (shift & 8) a = {a.z, a.w, b.x, b.y}, b = {b.z, b.w, 0, 0};
  if (shift & 4) a = {a.y, a.z, a.w, b.x}, b = {b.y, b.z, b.w, 0};
  if (shift & 2) {
    a = {__funnelshift_r(a.x, a.y, 16), __funnelshift_r(a.y, a.z, 16), __funnelshift_r(a.z, a.w, 16),
         __funnelshift_r(a.w, b.x, 16)};
  }
  return a;
}

// Eight elements from any address, in 16-byte reads. Which elements a thread gets must not depend on where a row lies in
// memory, or the order of the sums would.
__device__ __forceinline__ Packed fetch_shifted(const void* data, Dtype dtype, int64_t at) {
  Packed result;
  result.wide = dtype == Dtype::float32;
  if (result.wide) {
    result.set(0, shifted_16_bytes(static_cast<const float*>(data) + at));
    result.set(4, shifted_16_bytes(static_cast<const float*>(data) + at + 4));
  } else {
    result.set(0, shifted_16_bytes(static_cast<const uint16_t*>(data) + at));
  }
  return result;
}

// Eight elements that are `stride` apart, one by one. Only the first `count` exist; the others become `fill`.
__device__ __forceinline__ Packed fetch_one_by_one(const void* data, Dtype dtype, int64_t at, int64_t stride,
                                                   int64_t count, float fill) {
  Packed result;
  result.wide = true;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    result.words[i] = __float_as_uint(i < count ? load(data, dtype, at + i * stride) : fill);
  }
  return result;
}

// Eight elements of a row of a matrix, from column t on; 0 after the first `count`.
__device__ __forceinline__ Packed fetch(const View& view, int64_t row, int64_t t, int64_t count) {
  const int64_t at = row * view.row_stride + t * view.stride;
  const char* address = static_cast<const char*>(view.data) + at * (view.dtype == Dtype::float32 ? 4 : 2);
  if (count >= kVector && view.stride == 1 && is_aligned(address)) return fetch_aligned(view.data, view.dtype, at);
  return fetch_one_by_one(view.data, view.dtype, at, view.stride, count, 0.0f);
}

// The same of a contiguous array of float32.
__device__ __forceinline__ Packed fetch(const float* data, int64_t at, int64_t count) {
  return fetch(View{data, Dtype::float32, 0, 1}, 0, at, count);
}

// Stores the first `count` of eight elements, 16 bytes at a time where the address allows it.
__device__ __forceinline__ void store_vector(void* data, Dtype dtype, int64_t at, int64_t count,
                                             const float (&x)[kVector]) {
  if (dtype == Dtype::float32) {
    float* to = static_cast<float*>(data) + at;
    if (count >= kVector && is_aligned(to)) {
      uint32_t bits[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) bits[i] = __float_as_uint(x[i]);
      store_16_bytes(to, {bits[0], bits[1], bits[2], bits[3]});
      store_16_bytes(to + 4, {bits[4], bits[5], bits[6], bits[7]});
      return;
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + at;
    if (count >= kVector && is_aligned(to)) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = narrowed(x[2 * i], x[2 * i + 1], dtype);
      store_16_bytes(to, {words[0], words[1], words[2], words[3]});
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) store(data, dtype, at + i, x[i]);
  }
}

template <class Bits>
__device__ __forceinline__ unsigned load_mask_of(const Mask& mask, int64_t at, int64_t count) {
  const Bits* from = static_cast<const Bits*>(mask.data) + at;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) bits |= (static_cast<Bits>(from[i] << mask.sign_bits) != 0) << i;
  }
  return bits;
}

// As Rows::offset, of a row's number that fits 32 bits, as all here do: divisions of 64 bits take a hundred instructions.
__device__ __forceinline__ int64_t offset_of(const Rows& rows, unsigned row) {
  int64_t result = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d > 0; --d) {
    const auto size = static_cast<unsigned>(rows.sizes[d]);
    result += int64_t{row % size} * rows.strides[d];
    row /= size;
  }
  return rows.dims ? result + int64_t{row} * rows.strides[0] : 0;
}

__device__ __forceinline__ int64_t integer_at(const Integers& integers, unsigned row) {
  if (!integers.data) return integers.all;
  const int64_t at = offset_of(integers.places, row);
  return integers.wide ? static_cast<const int64_t*>(integers.data)[at] : static_cast<const int32_t*>(integers.data)[at];
}

// Which of eight positions the mask keeps, one bit each.
__device__ __forceinline__ unsigned load_mask(const Mask& mask, int64_t at, int64_t count) {
  if (!mask.data) return count >= kVector ? (1u << kVector) - 1 : count > 0 ? (1u << count) - 1 : 0;
  if (mask.size == 8) return load_mask_of<uint64_t>(mask, at, count);
  if (mask.size == 4) return load_mask_of<uint32_t>(mask, at, count);
  if (mask.size == 2) return load_mask_of<uint16_t>(mask, at, count);
  const uint8_t* from = static_cast<const uint8_t*>(mask.data) + at;
  if (count < kVector || reinterpret_cast<uintptr_t>(from) % 8 != 0) return load_mask_of<uint8_t>(mask, at, count);
  unsigned bits = 0;
  const uint2 words = *reinterpret_cast<const uint2*>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) bits |= ((((i < 4 ? words.x : words.y) >> (8 * (i % 4))) & 0xff) != 0) << i;
  return bits;
}

// ------------------------------------------------------------------------------------------------------------ launch

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("rlhf_kernels: a CUDA kernel was not launched: ") + cudaGetErrorString(error));
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("rlhf_kernels: the input is too large for one launch");
#if defined(__CUDACC__)
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  check(cudaGetLastError());
#else
  emulation::run(static_cast<unsigned>(blocks), threads, [&] { kernel(Parameters(arguments)...); });
  static_cast<void>(stream);
#endif
}

}  // namespace rlhf_kernels::cuda
