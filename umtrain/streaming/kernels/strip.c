/* What a strip's pixels go through between convolutions, one pass each.
 *
 * A strip is channels-last: P pixels of C channels, dense. Coefficients are per channel. An image
 * stride of 0 in `cs` means that all images share their coefficients. Storage is bf16, fp32 or
 * fp64; arithmetic is in fp32, or fp64 for fp64; sums over pixels end in fp64, in an order that
 * depends on the number of threads alone.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define TILE 32
#define BLOCK 128

INLINE float load_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t store_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; /* to nearest, ties to even */
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

#define T uint16_t
#define A float
#define LOAD load_bf16
#define STORE store_bf16
#define NAME(f) f##_bf16
#include "strip_body.h"

#define T float
#define A float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(f) f##_f32
#include "strip_body.h"

#define T double
#define A double
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(f) f##_f64
#include "strip_body.h"
