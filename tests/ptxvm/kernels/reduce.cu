// Sums a vector: shuffles in each warp, shared memory between warps, an atomic between blocks.
// The racy variant omits the barrier between warps.
template <bool racy>
__device__ void reduce(const float* x, float* sum, int n) {
    __shared__ float partial[32];
    float mine = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        mine += x[i];
    for (int d = 16; d > 0; d /= 2) mine += __shfl_down_sync(0xffffffff, mine, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    if (!racy) __syncthreads();
    if (threadIdx.x < 32) {
        float v = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
        for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffff, v, d);
        if (threadIdx.x == 0) atomicAdd(sum, v);
    }
}

extern "C" __global__ void warp_reduce(const float* x, float* sum, int n) {
    reduce<false>(x, sum, n);
}

extern "C" __global__ void warp_reduce_racy(const float* x, float* sum, int n) {
    reduce<true>(x, sum, n);
}
