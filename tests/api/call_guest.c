/* call_guest.c - the guest side of call.c: built as a flat image at 0x10000, once for 64-bit code and once for 32-bit code,
 * with a table of its functions at the start. The second half of the table is the first half in the other convention: ms_abi,
 * stdcall. */
#ifdef __x86_64__
#define OTHER __attribute__((ms_abi))
#else
#define OTHER __attribute__((stdcall))
#endif
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned long ptr;

/* Each function in both conventions: DEFINE(name, convention). */
#define FUNCTIONS(F, C) \
    F##_ints(C) F##_mixed(C) F##_single(C) F##_length(C) F##_fill(C) F##_sum(C) F##_i8(C) F##_i16(C) F##_i32(C) F##_i64(C) \
    F##_nothing(C) F##_factorial(C) F##_forever(C) F##_undefined(C) F##_doubles(C) F##_host_ints(C) F##_host_mixed(C) \
    F##_host_string(C) F##_host_buffer(C) F##_host_narrow(C) F##_host_number(C) F##_read(C)

#define NAME(name, C) name##_##C

#define ATTR_a
#define ATTR_b OTHER
#define DO_ints(C) ATTR_##C u64 NAME(ints, C)(u8 a, i8 b, u16 c, i16 d, u32 e, i32 f, u64 g, i64 h, u8 i, i8 j) \
    { return a + 3 * (u64)(i64)b + 5 * (u64)c + 7 * (u64)(i64)d + 11 * (u64)e + 13 * (u64)(i64)f + 17 * g + 19 * (u64)h + 23 * (u64)i + 29 * (u64)(i64)j; }
#define DO_mixed(C) ATTR_##C double NAME(mixed, C)(u32 a, double b, u8 c, float d, i64 e, double f, ptr g, float h, i16 i, \
                                                double j, u64 k, double l, u32 m, float n, float o, double p, double q) \
    { return a + 2 * b + 3 * c + 4 * d + 5 * (double)e + 6 * f + 7 * (double)(u32)g + 8 * h + 9 * i + 10 * j + 11 * (double)(u32)k + 12 * l + \
             13.0 * m + 14 * n + 15 * o + 16 * p + 17 * q; }
#define DO_single(C) ATTR_##C float NAME(single, C)(float a, u32 b, float c) { return a * 2 + (float)b - c; }
#define DO_length(C) ATTR_##C u32 NAME(length, C)(const char *s) { u32 n = 0; if (!s) return 12345; while (s[n]) n++; return n; }
#define DO_fill(C) ATTR_##C void NAME(fill, C)(u8 *to, u32 bytes, u8 first) { for (u32 i = 0; i < bytes; i++) to[i] = (u8)(to[i] + first + i); }
#define DO_sum(C) ATTR_##C u32 NAME(sum, C)(const u8 *p, u32 bytes) { u32 s = 0; for (u32 i = 0; i < bytes; i++) s = 31 * s + p[i]; return s; }
#define DO_i8(C) ATTR_##C i8 NAME(i8, C)(i8 a) { return (i8)(a - 1); }
#define DO_i16(C) ATTR_##C i16 NAME(i16, C)(i16 a) { return (i16)(a - 1); }
#define DO_i32(C) ATTR_##C i32 NAME(i32, C)(i32 a) { return a - 1; }
#define DO_i64(C) ATTR_##C i64 NAME(i64, C)(i64 a) { return a - 1; }
#define DO_nothing(C) ATTR_##C void NAME(nothing, C)(void) { __asm__ volatile("" : : : "memory"); }
#define DO_factorial(C) ATTR_##C u64 NAME(factorial, C)(ATTR_##C u64 (*host)(u32), u32 n) { return n < 2 ? 1 : n * host(n - 1); }
#define DO_forever(C) ATTR_##C void NAME(forever, C)(void) { for (;;) __asm__ volatile("nop"); }
#define DO_undefined(C) ATTR_##C void NAME(undefined, C)(void) { __asm__ volatile("ud2"); }
#define DO_doubles(C) ATTR_##C double NAME(doubles, C)(double a, double b, double c, double d, double e, double f, double g, double h, double i, double j) \
    { return a - b * 2 + c * 3 - d * 4 + e * 5 - f * 6 + g * 7 - h * 8 + i * 9 - j * 10; }

/* These call a function of the host. */
#define DO_host_ints(C) ATTR_##C u64 NAME(host_ints, C)(ATTR_##C u64 (*fn)(u8, i8, u16, i16, u32, i32, u64, i64, u8, i8)) \
    { return fn(200, -100, 60000, -30000, 4000000000u, -2000000000, 0xfedcba9876543210, -9000000000000000000, 7, -7) + 1; }
#define DO_host_mixed(C) ATTR_##C double NAME(host_mixed, C)(ATTR_##C double (*fn)(u32, double, u8, float, i64, double, ptr, float, \
                                  i16, double, u64, double, u32, float, float, double, double)) \
    { return fn(1, 2.5, 3, 4.25f, -5, 6.125, 7, 8.5f, -9, 10.75, 11, 12.5, 13, 14.5f, 15.25f, 16.5, 17.125) * 2; }
#define DO_host_string(C) ATTR_##C u32 NAME(host_string, C)(ATTR_##C u32 (*fn)(const char *, u32, const char *)) \
    { static const char text[] = "from the guest"; return fn(text, 77, 0) + 1; }
#define DO_host_buffer(C) ATTR_##C u32 NAME(host_buffer, C)(ATTR_##C u16 (*fn)(u8 *, u32, const u8 *), u32 bytes) \
    { u8 b[64]; u32 s; for (u32 i = 0; i < 64; i++) b[i] = (u8)i; s = fn(b, bytes, b + 32); for (u32 i = 0; i < 64; i++) s += b[i]; return s; }
#define DO_host_narrow(C) ATTR_##C i64 NAME(host_narrow, C)(ATTR_##C i8 (*fn)(float), float x) { return (i64)fn(x) * 2; }
#define DO_host_number(C) ATTR_##C double NAME(host_number, C)(ATTR_##C float (*fn)(double, i64), i64 n) { return (double)fn(0.5, n) + 1; }
#define DO_read(C) ATTR_##C u32 NAME(read, C)(const volatile u32 *p) { return *p; }

FUNCTIONS(DO, a)
FUNCTIONS(DO, b)

#define ENTRY(name, C) (const void *)NAME(name, C),
#define IN_ints(C) ENTRY(ints, C)
#define IN_mixed(C) ENTRY(mixed, C)
#define IN_single(C) ENTRY(single, C)
#define IN_length(C) ENTRY(length, C)
#define IN_fill(C) ENTRY(fill, C)
#define IN_sum(C) ENTRY(sum, C)
#define IN_i8(C) ENTRY(i8, C)
#define IN_i16(C) ENTRY(i16, C)
#define IN_i32(C) ENTRY(i32, C)
#define IN_i64(C) ENTRY(i64, C)
#define IN_nothing(C) ENTRY(nothing, C)
#define IN_factorial(C) ENTRY(factorial, C)
#define IN_forever(C) ENTRY(forever, C)
#define IN_undefined(C) ENTRY(undefined, C)
#define IN_doubles(C) ENTRY(doubles, C)
#define IN_host_ints(C) ENTRY(host_ints, C)
#define IN_host_mixed(C) ENTRY(host_mixed, C)
#define IN_host_string(C) ENTRY(host_string, C)
#define IN_host_buffer(C) ENTRY(host_buffer, C)
#define IN_host_narrow(C) ENTRY(host_narrow, C)
#define IN_host_number(C) ENTRY(host_number, C)
#define IN_read(C) ENTRY(read, C)
__attribute__((section(".table"), used)) const void *const table[] = { FUNCTIONS(IN, a) FUNCTIONS(IN, b) };
