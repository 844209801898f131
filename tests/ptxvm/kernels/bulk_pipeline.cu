// Sums pages that a loader warp streams through a ring in shared memory with cp.async.bulk and
// mbarriers. The racy variant hands pages back before everybody has read them.
constexpr int STAGES = 3;
constexpr int PAGE_FLOATS = 256;
constexpr int COMPUTE_THREADS = 64;

__device__ void wait(unsigned bar, unsigned parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(bar), "r"(parity) : "memory");
}

template <bool racy>
__device__ void pipeline(const float* x, float* out, int pages) {
    __shared__ alignas(128) float ring[STAGES][PAGE_FLOATS];
    __shared__ alignas(8) unsigned long long full[STAGES], empty[STAGES];
    unsigned full_at = __cvta_generic_to_shared(full);
    unsigned empty_at = __cvta_generic_to_shared(empty);
    unsigned ring_at = __cvta_generic_to_shared(ring);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_at + 8 * s));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty_at + 8 * s),
                         "r"(COMPUTE_THREADS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= COMPUTE_THREADS) {
        if (threadIdx.x != COMPUTE_THREADS) return;
        for (int p = 0; p < pages; p++) {
            int s = p % STAGES;
            if (p >= STAGES) wait(empty_at + 8 * s, (p / STAGES - 1) & 1);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                             full_at + 8 * s), "r"(PAGE_FLOATS * 4) : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[%0], [%1], %2, [%3];" ::"r"(ring_at + s * PAGE_FLOATS * 4),
                "l"(__cvta_generic_to_global(x + p * PAGE_FLOATS)), "r"(PAGE_FLOATS * 4),
                "r"(full_at + 8 * s) : "memory");
        }
        return;
    }
    float sum = 0.0f;
    for (int p = 0; p < pages; p++) {
        int s = p % STAGES;
        wait(full_at + 8 * s, p / STAGES & 1);
        if (racy)
            asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(
                empty_at + 8 * s) : "memory");
        for (int i = threadIdx.x; i < PAGE_FLOATS; i += COMPUTE_THREADS) sum += ring[s][i];
        if (!racy)
            asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(
                empty_at + 8 * s) : "memory");
    }
    out[threadIdx.x] = sum;
}

extern "C" __global__ void bulk_pipeline(const float* x, float* out, int pages) {
    pipeline<false>(x, out, pages);
}

extern "C" __global__ void bulk_pipeline_racy(const float* x, float* out, int pages) {
    pipeline<true>(x, out, pages);
}
