// All kernels, as one image, and the list of them.
#include "attend.cuh"
#include "latent.cuh"
#include "linear.cuh"
#include "linear_wg.cuh"
#include "lora.cuh"
#include "moves.cuh"
#include "prefill.cuh"
#include "prefill_wg.cuh"
#include "probe.cuh"
#include "rebuild.cuh"
#include "rows.cuh"
#include "sample.cuh"
#include "seal.cuh"
#include "warpgroup.cuh"

#define STRAIT_SEALED(X, m, n) \
    X(attend_sealed_##m##_##n##_22) X(attend_sealed_##m##_##n##_23) X(attend_sealed_##m##_##n##_24) \
    X(attend_sealed_##m##_##n##_32) X(attend_sealed_##m##_##n##_33) X(attend_sealed_##m##_##n##_34) \
    X(attend_sealed_##m##_##n##_42) X(attend_sealed_##m##_##n##_43) X(attend_sealed_##m##_##n##_44)
#define STRAIT_SEALED_WG(X, m, c) \
    X(attend_sealed_wg_##m##_##c##_22) X(attend_sealed_wg_##m##_##c##_23) X(attend_sealed_wg_##m##_##c##_24) \
    X(attend_sealed_wg_##m##_##c##_32) X(attend_sealed_wg_##m##_##c##_33) X(attend_sealed_wg_##m##_##c##_34) \
    X(attend_sealed_wg_##m##_##c##_42) X(attend_sealed_wg_##m##_##c##_43) X(attend_sealed_wg_##m##_##c##_44)
#define STRAIT_PREFILL(X, d) X(prefill_##d) X(prefill_wg_##d)
#define STRAIT_KERNELS(X) \
    X(absorb) X(attend_absorbed) X(attend_rebuilt) X(rebuild_pages) STRAIT_SEALED(X, 1, 1) STRAIT_SEALED(X, 1, 4) STRAIT_SEALED(X, 2, 1) STRAIT_SEALED(X, 2, 4) \
    STRAIT_SEALED_WG(X, 1, 2) STRAIT_SEALED_WG(X, 1, 4) STRAIT_SEALED_WG(X, 2, 2) STRAIT_SEALED_WG(X, 2, 4) \
    X(attend_exact_b16_64) X(attend_exact_b16_80) X(attend_exact_b16_96) X(attend_exact_b16_128) \
    X(attend_exact_f32_64) X(attend_exact_f32_80) X(attend_exact_f32_96) X(attend_exact_f32_128) X(merge) \
    STRAIT_PREFILL(X, 64) STRAIT_PREFILL(X, 80) STRAIT_PREFILL(X, 96) STRAIT_PREFILL(X, 128) \
    X(embed) X(rms_norm) X(silu_mul) X(rope_append_b16) X(rope_append_f32) \
    X(seal_project_b16) X(seal_project_f32) X(seal_codes) \
    X(linear_few_m1_n1) X(linear_few_m1_n2) X(linear_few_m1_n4) X(linear_few_m1_n8) \
    X(linear_few_m2_n1) X(linear_few_m2_n2) X(linear_few_m2_n4) X(linear_few_m2_n8) X(linear_few_m4_n4) X(linear_few_m4_n8) \
    X(linear_worn_m1_n1) X(linear_worn_m1_n2) X(linear_worn_m1_n4) X(linear_worn_m1_n8) \
    X(linear_worn_m2_n1) X(linear_worn_m2_n2) X(linear_worn_m2_n4) X(linear_worn_m2_n8) X(linear_normed_m1) X(linear_normed_m2) X(linear_many) X(linear_wg_256) X(linear_wg_128) X(lora_shrink) X(lora_expand) X(adapt_rows) X(embed_adapted) X(probe_read) X(hidden_rows) X(pick_rows) X(keep_sinks) \
    X(sample_best) X(sample_top) X(sample_bend) X(sample_weigh) X(sample_gather) X(sample_choose)
