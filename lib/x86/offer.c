/* offer.c - fits a decoded instruction to the CPU model: what CPUID does not show does not exist.
 *
 * Decoding knows nothing of the model; whoever caches decoded instructions for a CPU passes them through x86_offer() once, and
 * then need not think of it again. System and vector instructions check their features themselves.
 */
#include <Zydis/Mnemonic.h>
#include "x86/cover.h"
#include "x86/ops.h"
#include "x86/system.h"

#define FEATURE(word, bit) (X86_FEAT(X86_W_##word, bit) + 1)
#define CMOV FEATURE(1_EDX, 15)
#define BMI1 FEATURE(7_EBX, 3)
#define BMI2 FEATURE(7_EBX, 8)
#define ADX FEATURE(7_EBX, 19)
#define MMX FEATURE(1_EDX, 23)
#define SSE FEATURE(1_EDX, 25)
#define SSE2 FEATURE(1_EDX, 26)
#define FXSR FEATURE(1_EDX, 24)
#define M(name) [ZYDIS_MNEMONIC_##name]

/* Feature number + 1, 0: on every model. */
static const uint16_t needed[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
    M(CMOVB) = CMOV, M(CMOVBE) = CMOV, M(CMOVL) = CMOV, M(CMOVLE) = CMOV, M(CMOVNB) = CMOV, M(CMOVNBE) = CMOV, M(CMOVNL) = CMOV,
    M(CMOVNLE) = CMOV, M(CMOVNO) = CMOV, M(CMOVNP) = CMOV, M(CMOVNS) = CMOV, M(CMOVNZ) = CMOV, M(CMOVO) = CMOV, M(CMOVP) = CMOV,
    M(CMOVS) = CMOV, M(CMOVZ) = CMOV,
    M(CMPXCHG8B) = FEATURE(1_EDX, 8), M(CMPXCHG16B) = FEATURE(1_ECX, 13),
    M(POPCNT) = FEATURE(1_ECX, 23), M(MOVBE) = FEATURE(1_ECX, 22), M(CRC32) = FEATURE(1_ECX, 20),
    M(LZCNT) = FEATURE(E1_ECX, 5), M(TZCNT) = BMI1,
    M(ANDN) = BMI1, M(BEXTR) = BMI1, M(BLSI) = BMI1, M(BLSMSK) = BMI1, M(BLSR) = BMI1,
    M(BZHI) = BMI2, M(PDEP) = BMI2, M(PEXT) = BMI2, M(RORX) = BMI2, M(SARX) = BMI2, M(SHLX) = BMI2, M(SHRX) = BMI2, M(MULX) = BMI2,
    M(ADCX) = ADX, M(ADOX) = ADX,
    M(CLFLUSH) = FEATURE(1_EDX, 19), M(CLFLUSHOPT) = FEATURE(7_EBX, 23), M(CLWB) = FEATURE(7_EBX, 24),
    M(MOVNTI) = SSE2, M(PREFETCHNTA) = SSE, M(PREFETCHT0) = SSE, M(PREFETCHT1) = SSE, M(PREFETCHT2) = SSE,
    M(PREFETCH) = CMOV, M(PREFETCHW) = CMOV, M(PREFETCHWT1) = CMOV,    /* no older CPU knows 0F 0D */
    M(SFENCE) = SSE, M(LFENCE) = SSE2, M(MFENCE) = SSE2,
    M(FCMOVB) = CMOV, M(FCMOVBE) = CMOV, M(FCMOVE) = CMOV, M(FCMOVNB) = CMOV, M(FCMOVNBE) = CMOV, M(FCMOVNE) = CMOV,
    M(FCMOVNU) = CMOV, M(FCMOVU) = CMOV, M(FCOMI) = CMOV, M(FCOMIP) = CMOV, M(FUCOMI) = CMOV, M(FUCOMIP) = CMOV,
    M(FISTTP) = FEATURE(1_ECX, 0), M(EMMS) = MMX, M(MASKMOVQ) = SSE, M(MASKMOVDQU) = SSE2, M(FXSAVE) = FXSR, M(FXRSTOR) = FXSR,
    M(RDTSC) = FEATURE(1_EDX, 4), M(RDMSR) = FEATURE(1_EDX, 5), M(WRMSR) = FEATURE(1_EDX, 5),
    M(RDPMC) = MMX,                    /* came with the Pentium's MMX version and has no bit of its own */
    M(RDPID) = FEATURE(7_ECX, 22),
};

static unsigned feature_of(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_NOP: return in->map == 1 ? CMOV : 0;                        /* 0F 18 to 1F came with the P6 */
    case ZYDIS_MNEMONIC_LAHF: case ZYDIS_MNEMONIC_SAHF: return in->mode == 8 ? FEATURE(E1_ECX, 0) : 0;
    default: return needed[in->mnemonic];
    }
}

/* F3 is ignored before BSF and BSR where TZCNT and LZCNT are not known: it becomes another prefix without effect here (the
 * segment has been decoded), for those who encode the instruction again. */
static void make_scan(x86_insn *in, unsigned mnemonic, x86_exec_fn exec)
{
    for (unsigned i = 0; i < in->opcode_off; i++)
        if (in->bytes[i] == 0xf3)
            in->bytes[i] = 0x3e;
    in->mnemonic = (uint16_t)mnemonic;
    in->exec = exec;
    in->flags_maybe |= in->flags_written & ~X86_FL_ZF & 0xfff;
    in->flags_written &= X86_FL_ZF;
}

void x86_offer(x86_cpu *cpu, x86_insn *in)
{
    unsigned feature = feature_of(in);
    if (cpu->cover.log)
        x86_log_compare(in);
    if (!feature || x86_has(cpu, feature - 1))
        return;
    if (in->mnemonic == ZYDIS_MNEMONIC_TZCNT)
        make_scan(in, ZYDIS_MNEMONIC_BSF, x86_op_bsf);
    else if (in->mnemonic == ZYDIS_MNEMONIC_LZCNT)
        make_scan(in, ZYDIS_MNEMONIC_BSR, x86_op_bsr);
    else {
        in->exec = x86_op_illegal;
        in->mnemonic = in->nops = 0;
        in->flags = X86_IF_END | X86_IF_BRANCH;
        in->flags_read = in->flags_written = in->flags_maybe = 0;
    }
}
