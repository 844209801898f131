// Each block writes its numbers, all blocks meet, each block reads its neighbour's. The racy
// variant meets without the fence that publishes the writes.
template <bool racy>
__device__ void meet(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        if (!racy) __threadfence();
        atomicAdd(counter, 1);
        while (*(volatile unsigned*)counter < gridDim.x) {}
        __threadfence();
    }
    __syncthreads();
}

template <bool racy>
__device__ void rotate(int* from, int* to, unsigned* counter) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    from[i] = 3 * i;
    meet<racy>(counter);
    to[i] = from[(i + blockDim.x) % (gridDim.x * blockDim.x)];
}

extern "C" __global__ void grid_barrier(int* from, int* to, unsigned* counter) {
    rotate<false>(from, to, counter);
}

extern "C" __global__ void grid_barrier_racy(int* from, int* to, unsigned* counter) {
    rotate<true>(from, to, counter);
}
