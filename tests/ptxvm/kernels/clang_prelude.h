// What the kernels need of CUDA, for clang without the CUDA headers.
#pragma once
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __host__ __attribute__((host))
#include <__clang_cuda_builtin_vars.h>

__device__ inline void __threadfence() { __nvvm_membar_gl(); }
__device__ inline void __syncwarp() { __nvvm_bar_warp_sync(0xffffffff); }
__device__ inline float __shfl_down_sync(unsigned mask, float value, int by) {
    return __nvvm_shfl_sync_down_f32(mask, value, by, 31);
}
__device__ inline float __shfl_xor_sync(unsigned mask, float value, int by) {
    return __nvvm_shfl_sync_bfly_f32(mask, value, by, 31);
}
__device__ inline float atomicAdd(float* at, float value) {
    return __nvvm_atom_add_gen_f(at, value);
}
__device__ inline unsigned atomicAdd(unsigned* at, unsigned value) {
    return __nvvm_atom_add_gen_i((int*)at, value);
}
__device__ inline unsigned long __cvta_generic_to_shared(const void* p) {
    return (unsigned)(unsigned long)(__attribute__((address_space(3))) const void*)p;
}
__device__ inline unsigned long __cvta_generic_to_global(const void* p) {
    return (unsigned long)(__attribute__((address_space(1))) const void*)p;
}
