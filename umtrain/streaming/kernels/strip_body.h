/* Included by strip.c once per storage type T with arithmetic type A. */

/* The range of pixels that this thread works on, in whole blocks. */
INLINE void NAME(share)(long P, long *first, long *last) {
    long n_blocks = (P + BLOCK - 1) / BLOCK, n = omp_get_num_threads(), i = omp_get_thread_num();
    *first = n_blocks * i / n * BLOCK;
    *last = n_blocks * (i + 1) / n * BLOCK;
    if (*last > P) *last = P;
}

/* sums[k][c] over the threads' parts, in the threads' order. */
INLINE void NAME(gather)(const double *parts, long n_threads, long n_sums, long C, double *sums) {
    for (long k = 0; k < n_sums * C; k++) {
        double sum = 0;
        for (long i = 0; i < n_threads; i++) sum += parts[i * n_sums * C + k];
        sums[k] = sum;
    }
}

INLINE void NAME(moments_tile)(const T *x, T *copy, const A *shift, long p0, long p1, long C,
                               long c0, long width, double *sum, double *square) {
    A acc[TILE] = {0}, acc2[TILE] = {0};
    for (long p = p0; p < p1; p++) {
        const T *row = x + p * C + c0;
#pragma GCC ivdep
        for (long j = 0; j < width; j++) {
            A v = LOAD(row[j]) - shift[c0 + j];
            acc[j] += v;
            acc2[j] += v * v;
        }
        if (copy) memcpy(copy + p * C + c0, row, width * sizeof(T));
    }
#pragma GCC ivdep
    for (long j = 0; j < width; j++) {
        sum[c0 + j] += acc[j];
        square[c0 + j] += acc2[j];
    }
}

/* sums[0][c] = sum of x - shift, sums[1][c] = sum of its square; copies x to `copy` if not null.
 * Returns 0, or 1 if there is no memory for the threads' parts. */
int NAME(moments)(const T *x, T *copy, const A *shift, long P, long C, double *sums) {
    long n_threads = omp_get_max_threads();
    double *parts = calloc(n_threads * 2 * C, sizeof(double));
    if (!parts) return 1;
#pragma omp parallel
    {
        long first, last;
        NAME(share)(P, &first, &last);
        double *sum = parts + omp_get_thread_num() * 2 * C, *square = sum + C;
        for (long p = first; p < last; p += BLOCK) {
            long p1 = p + BLOCK < last ? p + BLOCK : last;
            long c = 0;
            for (; c + TILE <= C; c += TILE)
                NAME(moments_tile)(x, copy, shift, p, p1, C, c, TILE, sum, square);
            if (c < C) NAME(moments_tile)(x, copy, shift, p, p1, C, c, C - c, sum, square);
        }
    }
    NAME(gather)(parts, n_threads, 2, C, sums);
    free(parts);
    return 0;
}

/* One value before the activation. */
INLINE A NAME(value)(const T *y1, const T *y2, const A *s1, const A *s2, const A *t, long c,
                     const int has_s1, const int has_y2, const int has_s2, const int has_t) {
    A v = LOAD(y1[c]);
    if (has_s1) v *= s1[c];
    if (has_y2) v += has_s2 ? LOAD(y2[c]) * s2[c] : LOAD(y2[c]);
    if (has_t) v += t[c];
    return v;
}

INLINE void NAME(blend_any)(T *out, const T *y1, const T *y2, const A *s1, const A *s2, const A *t,
                            long first, long last, long C, const int has_s1, const int has_y2,
                            const int has_s2, const int has_t, const int relu) {
    for (long p = first; p < last; p++) {
        const T *r1 = y1 + p * C, *r2 = has_y2 ? y2 + p * C : 0;
        T *to = out + p * C;
#pragma GCC ivdep
        for (long c = 0; c < C; c++) {
            A v = NAME(value)(r1, r2, s1, s2, t, c, has_s1, has_y2, has_s2, has_t);
            if (relu) v = v < 0 ? 0 : v; /* a NaN stays one */
            to[c] = STORE(v);
        }
    }
}

/* Calls FUNCTION with what the operands are as constants, so that each case is compiled alone. */
#define CASE(a, b, c, d, e)                                                            \
    if (h1 == a && hy == b && h2 == c && ht == d && relu == e) {                       \
        FUNCTION(a, b, c, d, e);                                                       \
        known = 1;                                                                     \
    }
#define CASES_RELU(a, b, c, d) CASE(a, b, c, d, 0) CASE(a, b, c, d, 1)
#define ALL_CASES                                                                      \
    CASES_RELU(0, 0, 0, 0) CASES_RELU(1, 0, 0, 1) CASES_RELU(0, 1, 0, 0)               \
    CASES_RELU(1, 1, 0, 1) CASES_RELU(0, 1, 1, 1) CASES_RELU(1, 1, 1, 1)

/* out = act(s1 y1 + s2 y2 + t); null s is 1, null y2 and t are 0. Returns 0 if it was done. */
int NAME(blend)(T *out, const T *y1, const T *y2, const A *s1, const A *s2, const A *t, long P,
                long C, int relu) {
    int h1 = s1 != 0, hy = y2 != 0, h2 = s2 != 0, ht = t != 0, unknown = 0;
#pragma omp parallel reduction(| : unknown)
    {
        long first, last;
        int known = 0;
        NAME(share)(P, &first, &last);
#define FUNCTION(a, b, c, d, e) \
    NAME(blend_any)(out, y1, y2, s1, s2, t, first, last, C, a, b, c, d, e)
        ALL_CASES
#undef FUNCTION
        unknown |= !known;
    }
    return unknown;
}

INLINE void NAME(backward_tile)(T *g, const T *dz, const T *y1, const T *y2, const A *s1,
                                const A *s2, const A *t, const A *m1, const A *m2, long p0, long p1,
                                long C, long c0, long width, double *sums, const int has_s1,
                                const int has_y2, const int has_s2, const int has_t, const int relu,
                                const int add) {
    A acc[TILE] = {0}, acc1[TILE] = {0}, acc2[TILE] = {0};
    for (long p = p0; p < p1; p++) {
        const T *r1 = y1 + p * C + c0, *r2 = has_y2 ? y2 + p * C + c0 : 0;
        const T *from = dz + p * C + c0;
        T *to = g + p * C + c0;
#pragma GCC ivdep
        for (long j = 0; j < width; j++) {
            A d = LOAD(from[j]);
            if (relu) {
                A v = NAME(value)(r1, r2, s1 + c0, s2 + c0, t + c0, j, has_s1, has_y2, has_s2, has_t);
                d = v <= 0 ? 0 : d;
            }
            if (has_s1 || has_s2) acc[j] += d;
            if (has_s1) acc1[j] += d * (LOAD(r1[j]) - m1[c0 + j]);
            if (has_s2) acc2[j] += d * (LOAD(r2[j]) - m2[c0 + j]);
            to[j] = add ? STORE(LOAD(to[j]) + d) : STORE(d);
        }
    }
#pragma GCC ivdep
    for (long j = 0; j < width; j++) {
        sums[c0 + j] += acc[j];
        sums[C + c0 + j] += acc1[j];
        sums[2 * C + c0 + j] += acc2[j];
    }
}

INLINE void NAME(backward_any)(T *g, const T *dz, const T *y1, const T *y2, const A *s1,
                               const A *s2, const A *t, const A *m1, const A *m2, long first,
                               long last, long C, double *sums, const int has_s1,
                               const int has_y2, const int has_s2, const int has_t, const int relu,
                               const int add) {
    for (long p = first; p < last; p += BLOCK) {
        long p1 = p + BLOCK < last ? p + BLOCK : last, c = 0;
        for (; c + TILE <= C; c += TILE)
            NAME(backward_tile)(g, dz, y1, y2, s1, s2, t, m1, m2, p, p1, C, c, TILE, sums, has_s1,
                                has_y2, has_s2, has_t, relu, add);
        if (c < C)
            NAME(backward_tile)(g, dz, y1, y2, s1, s2, t, m1, m2, p, p1, C, c, C - c, sums, has_s1,
                                has_y2, has_s2, has_t, relu, add);
    }
}

/* g = dz where the blend's activation passes it (added to g if `add`), which may be dz itself.
 * sums[0] = sum of it; sums[1], sums[2] = sums of it times y1 - m1, y2 - m2, for terms with s.
 * Returns 0 if it was done. */
int NAME(blend_backward)(T *g, const T *dz, const T *y1, const T *y2, const A *s1, const A *s2,
                         const A *t, const A *m1, const A *m2, long P, long C, int relu, int add,
                         double *sums) {
    long n_threads = omp_get_max_threads();
    double *parts = calloc(n_threads * 3 * C, sizeof(double));
    if (!parts) return 1;
    int h1 = s1 != 0, hy = y2 != 0, h2 = s2 != 0, ht = t != 0, unknown = 0;
#pragma omp parallel reduction(| : unknown)
    {
        long first, last;
        int known = 0;
        double *own = parts + omp_get_thread_num() * 3 * C;
        NAME(share)(P, &first, &last);
#define FUNCTION(a, b, c, d, e)                                                                    \
    if (add) NAME(backward_any)(g, dz, y1, y2, s1, s2, t, m1, m2, first, last, C, own, a, b, c, d, \
                                e, 1);                                                             \
    else NAME(backward_any)(g, dz, y1, y2, s1, s2, t, m1, m2, first, last, C, own, a, b, c, d, e, 0)
        ALL_CASES
#undef FUNCTION
        unknown |= !known;
    }
    NAME(gather)(parts, n_threads, 3, C, sums);
    free(parts);
    return unknown;
}

/* out = s g + a + b y; null y: out = s g. */
int NAME(finish)(T *out, const T *g, const T *y, const A *s, const A *a, const A *b, long P,
                 long C) {
#pragma omp parallel
    {
        long first, last;
        NAME(share)(P, &first, &last);
        for (long p = first; p < last; p++) {
            const T *rg = g + p * C, *ry = y ? y + p * C : 0;
            T *to = out + p * C;
            if (ry)
#pragma GCC ivdep
                for (long c = 0; c < C; c++)
                    to[c] = STORE(s[c] * LOAD(rg[c]) + (a[c] + b[c] * LOAD(ry[c])));
            else
#pragma GCC ivdep
                for (long c = 0; c < C; c++) to[c] = STORE(s[c] * LOAD(rg[c]));
        }
    }
    return 0;
}

#undef ALL_CASES
#undef CASES_RELU
#undef CASE
#undef T
#undef A
#undef LOAD
#undef STORE
#undef NAME
