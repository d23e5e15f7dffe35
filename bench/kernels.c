/* kernels.c - the benchmark's guest code: small loops that each strain one thing. Freestanding; linked at a fixed address, so
 * that the very same bytes run natively, in libvm, in Unicorn and inside a guest kernel. Entry: kernel(which, n). */
#include <stddef.h>
#include <stdint.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;

static u8 arena[24 << 20] __attribute__((aligned(4096)));

static __attribute__((noinline)) unsigned fib_of(unsigned n) { return n < 2 ? n : fib_of(n - 1) + fib_of(n - 2); }
static u64 run_fib(u64 n) { return fib_of((unsigned)n); }

static u64 run_sieve(u64 rounds)
{
    enum { LIMIT = 1 << 20 };
    u64 primes = 0;
    while (rounds--) {
        for (u32 i = 0; i < LIMIT; i++)
            arena[i] = 0;
        for (u32 i = 2; i < LIMIT; i++) {
            if (arena[i])
                continue;
            primes++;
            for (u32 k = i + i; k < LIMIT; k += i)
                arena[k] = 1;
        }
    }
    return primes;
}

static u32 rotate(u32 v, unsigned n) { return v << n | v >> (32 - n); }
static void sha1_block(u32 *h, const u32 *message)
{
    u32 w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int t = 0; t < 16; t++)
        w[t] = message[t];
    for (int t = 16; t < 80; t++)
        w[t] = rotate(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);
    for (int t = 0; t < 80; t++) {
        u32 f = t < 20 ? ((b & c) | (~b & d)) + 0x5a827999 : t < 40 ? (b ^ c ^ d) + 0x6ed9eba1
              : t < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8f1bbcdc : (b ^ c ^ d) + 0xca62c1d6;
        u32 next = rotate(a, 5) + f + e + w[t];
        e = d, d = c, c = rotate(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}
static u64 run_sha1(u64 blocks)
{
    u32 h[5] = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0 }, m[16];
    for (u64 i = 0; i < blocks; i++) {
        for (u32 k = 0; k < 16; k++)
            m[k] = (u32)i * 16 + k;
        sha1_block(h, m);
    }
    return h[0] ^ h[4];
}

static u64 run_chase(u64 steps)
{
    enum { COUNT = 1 << 20 };
    u32 *next = (u32 *)(void *)arena, seed = 12345;
    for (u32 i = 0; i < COUNT; i++)
        next[i] = i;
    for (u32 i = COUNT - 1; i; i--) {      /* one cycle through all of them */
        seed = seed * 1664525 + 1013904223;
        u32 k = (u32)(((u64)seed * i) >> 32), swap = next[i];
        next[i] = next[k], next[k] = swap;
    }
    u32 at = 0;
    while (steps--)
        at = next[at];
    return at;
}

static u64 run_matmul(u64 rounds)
{
    enum { N = 192 };
    double *a = (double *)(void *)arena, *b = a + N * N, *c = b + N * N;
    for (int i = 0; i < N * N; i++)
        a[i] = i % 11, b[i] = i % 13;
    while (rounds--)
        for (int i = 0; i < N; i++) {
            for (int k = 0; k < N; k++)
                c[i * N + k] = 0;
            for (int k = 0; k < N; k++)
                for (int j = 0; j < N; j++)
                    c[i * N + j] += a[i * N + k] * b[k * N + j];
        }
    double sum = 0;
    for (int i = 0; i < N * N; i++)
        sum += c[i];
    return (u64)(int64_t)sum;
}

static u64 run_mandel(u64 size)
{
    u64 total = 0;
    for (u64 y = 0; y < size; y++)
        for (u64 x = 0; x < size; x++) {
            double cr = 3.0 * (double)(int64_t)x / (double)(int64_t)size - 2, ci = 2.0 * (double)(int64_t)y / (double)(int64_t)size - 1;
            double zr = 0, zi = 0;
            int i = 0;
            while (i < 256 && zr * zr + zi * zi < 4) {
                double t = zr * zr - zi * zi + cr;
                zi = 2 * zr * zi + ci, zr = t, i++;
            }
            total += (u64)i;
        }
    return total;
}

typedef int (*order)(const u32 *, const u32 *);
static int by_value(const u32 *a, const u32 *b) { return *a < *b ? -1 : *a > *b; }
static void sort(u32 *v, long n, order cmp)
{
    while (n > 1) {
        u32 pivot = v[n / 2];
        long i = 0, k = n - 1;
        for (;; i++, k--) {
            while (cmp(&v[i], &pivot) < 0)
                i++;
            while (cmp(&pivot, &v[k]) < 0)
                k--;
            if (i >= k)
                break;
            u32 t = v[i];
            v[i] = v[k], v[k] = t;
        }
        sort(v, i, cmp);
        v += i, n -= i;
    }
}
static u64 run_qsort(u64 n)
{
    static order volatile cmp = by_value;
    u32 *v = (u32 *)(void *)arena, seed = 7;
    for (u64 i = 0; i < n; i++)
        v[i] = seed = seed * 1103515245 + 12345;
    sort(v, (long)n, cmp);
    u64 h = 0;
    for (u64 i = 0; i < n; i += 501)
        h = h * 33 + v[i];
    return h;
}

static u64 run_bytecode(u64 rounds)
{
    static const u8 program[] = { 1, 3, 2, 4, 5, 1, 2, 3, 5, 4, 0 };
    static const void *const handler[] = { &&end, &&add, &&mix, &&shift, &&sub, &&turn };
    u64 a = 1, b = 2;
    const u8 *pc = program;
#define DISPATCH goto *handler[*pc++]
    DISPATCH;
add: a += b; DISPATCH;
mix: b ^= a >> 5; DISPATCH;
shift: a = a * 9 + 1; DISPATCH;
sub: b -= a; DISPATCH;
turn: b = b << 11 | b >> 53; DISPATCH;
end:
    if (--rounds) {
        pc = program;
        DISPATCH;
    }
    return a ^ b;
}

static u64 run_memcpy(u64 rounds)
{
    while (rounds--) {
        void *to = arena + (12 << 20), *from = arena;
        size_t n = 4 << 20;
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    }
    return arena[12 << 20];
}

#ifdef __x86_64__
__attribute__((target("aes"))) static u64 run_aes(u64 n)
{
    __m128i s = _mm_set_epi64x(1, 2), k = _mm_set_epi64x(3, 4);
    __m128i *out = (__m128i *)(void *)arena;
    for (u64 i = 0; i < n; i++) {
        for (int r = 0; r < 9; r++)
            s = _mm_aesenc_si128(s, k);
        s = _mm_aesenclast_si128(s, k);
        out[i & 1023] = s;
    }
    return (u64)_mm_cvtsi128_si64(s);
}
__attribute__((target("sse4.2"))) static u64 run_crc32(u64 n)
{
    u64 crc = ~UINT64_C(0);
    const u64 *p = (const u64 *)(const void *)arena;
    for (u64 i = 0; i < n; i++)
        crc = _mm_crc32_u64(crc, p[i & 8191]);
    return crc;
}
__attribute__((target("avx2,fma"))) static u64 run_avx2dot(u64 n)
{
    float *a = (float *)(void *)arena, *b = a + 8192;
    for (int i = 0; i < 8192; i++)
        a[i] = (float)(i % 5), b[i] = (float)(i % 3);
    __m256 sum = _mm256_setzero_ps();
    while (n--)
        for (int i = 0; i < 8192; i += 8)
            sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
    float lanes[8];
    _mm256_storeu_ps(lanes, sum);
    return (u64)(lanes[0] + lanes[7]);
}
static u64 run_x87(u64 n)
{
    long double x = 0.5L, sum = 0;
    for (u64 i = 0; i < n; i++) {
        sum += ((x * 0.25L + 1.5L) * x - 0.75L) * x + 0.125L;
        x += 0.0000001L;
    }
    return (u64)(int64_t)(sum * 1000);
}
#endif

#ifndef KERNELS_ARE_HOSTED           /* else guest_main.c has a table of its own */
static u64 (*const kernels[])(u64) = {
    run_fib, run_sieve, run_sha1, run_chase, run_matmul, run_mandel, run_qsort, run_bytecode, run_memcpy,
#ifdef __x86_64__
    run_aes, run_crc32, run_avx2dot, run_x87,
#endif
};

u64 kernel(u64 which, u64 n);
__attribute__((section(".text.entry"))) u64 kernel(u64 which, u64 n) { return kernels[which](n); }
void *memset(void *to, int c, size_t n);
void *memset(void *to, int c, size_t n)
{
    for (volatile u8 *p = to; n--; p++)
        *p = (u8)c;
    return to;
}
#endif
