/* signature.c - parsing signatures and laying out arguments: System V AMD64, Microsoft x64, i386 cdecl and stdcall, and
 * the registers of hypercalls. Only numbers and addresses exist, no structs, so each argument is one place.
 */
#include "core/signature.h"

#include <string.h>

static const struct { const char *name; uint8_t bytes; bool is_signed; ffi_type *ffi; } types[VM_T_COUNT] = {
    [VM_T_VOID] = { "void", 0, false, &ffi_type_void },
    [VM_T_U8] = { "u8", 1, false, &ffi_type_uint8 }, [VM_T_I8] = { "i8", 1, true, &ffi_type_sint8 },
    [VM_T_U16] = { "u16", 2, false, &ffi_type_uint16 }, [VM_T_I16] = { "i16", 2, true, &ffi_type_sint16 },
    [VM_T_U32] = { "u32", 4, false, &ffi_type_uint32 }, [VM_T_I32] = { "i32", 4, true, &ffi_type_sint32 },
    [VM_T_U64] = { "u64", 8, false, &ffi_type_uint64 }, [VM_T_I64] = { "i64", 8, true, &ffi_type_sint64 },
    [VM_T_F32] = { "f32", 4, false, &ffi_type_float }, [VM_T_F64] = { "f64", 8, false, &ffi_type_double },
    [VM_T_PTR] = { "ptr", 0, false, &ffi_type_uint64 },
    [VM_T_STR] = { "str", 0, false, &ffi_type_pointer }, [VM_T_BUF] = { "buf", 0, false, &ffi_type_pointer },
    [VM_T_CBUF] = { "cbuf", 0, false, &ffi_type_pointer },
    [VM_T_CPU] = { "cpu", 0, false, &ffi_type_pointer }, [VM_T_USER] = { "user", 0, false, &ffi_type_pointer },
};
static const char *const conventions[VM_CONV_COUNT] = {
    [VM_CONV_SYSV] = "sysv", [VM_CONV_WIN64] = "win64", [VM_CONV_CDECL] = "cdecl", [VM_CONV_STDCALL] = "stdcall",
};

unsigned vm_type_bytes(unsigned type, unsigned word)
{
    return types[type].bytes ? types[type].bytes : word;
}

uint64_t vm_type_extend(unsigned type, unsigned word, uint64_t raw)
{
    unsigned shift = 64 - 8 * vm_type_bytes(type, word);
    return types[type].is_signed ? (uint64_t)((int64_t)(raw << shift) >> shift) : raw << shift >> shift;
}

ffi_type *vm_type_ffi(unsigned type)
{
    return types[type].ffi;
}

/* ---- text ---- */

typedef struct reader { const char *text, *at, *function; } reader;

static void skip(reader *r)
{
    while (*r->at == ' ' || *r->at == '\t')
        r->at++;
}

static int bad(const reader *r, const char *what)
{
    return vm_fail(VM_E_INVALID, "%s: signature \"%.80s\": %s at character %zu", r->function, r->text, what,
                   (size_t)(r->at - r->text) + 1);
}

static bool take(reader *r, char c)
{
    skip(r);
    if (*r->at != c)
        return false;
    r->at++;
    return true;
}

static size_t word_length(const char *s)
{
    size_t n = 0;
    while ((s[n] >= 'a' && s[n] <= 'z') || (s[n] >= '0' && s[n] <= '9'))
        n++;
    return n;
}

static int take_type(reader *r, uint8_t *type)
{
    skip(r);
    size_t n = word_length(r->at);
    for (unsigned i = 0; i < VM_T_COUNT; i++)
        if (strlen(types[i].name) == n && !memcmp(types[i].name, r->at, n)) {
            r->at += n;
            *type = (uint8_t)i;
            return VM_OK;
        }
    return bad(r, "no type");
}

static int take_convention(reader *r, uint8_t *convention)
{
    skip(r);
    size_t n = word_length(r->at);
    const char *end = r->at + n;
    while (*end == ' ' || *end == '\t')
        end++;
    if (*end != ':')
        return VM_OK;
    for (unsigned i = 0; i < VM_CONV_COUNT; i++)
        if (conventions[i] && strlen(conventions[i]) == n && !memcmp(conventions[i], r->at, n)) {
            *convention = (uint8_t)i;
            r->at = end + 1;
            return VM_OK;
        }
    return bad(r, "no convention");
}

/* [123] after buf, cbuf. */
static int take_bytes(reader *r, vm_param *p)
{
    if (!take(r, '['))
        return VM_OK;
    skip(r);
    uint64_t n = 0;
    const char *digits = r->at;
    while (*r->at >= '0' && *r->at <= '9' && n <= VM_CALL_BUFFER)
        n = 10 * n + (uint64_t)(*r->at++ - '0');
    if (r->at == digits || n == 0 || n > VM_CALL_BUFFER)
        return bad(r, "no size of a buffer");
    p->has_bytes = true;
    p->bytes = (uint32_t)n;
    return take(r, ']') ? VM_OK : bad(r, "no ]");
}

static int take_param(reader *r, vm_signature *s, bool has_host)
{
    if (s->count == VM_CALL_ARGS)
        return bad(r, "too many arguments");
    vm_param *p = &s->params[s->count];
    const char *at = r->at;
    int status = take_type(r, &p->type);
    if (status)
        return status;
    bool is_host = p->type == VM_T_CPU || p->type == VM_T_USER;
    if (p->type == VM_T_VOID || (is_host && !has_host)) {
        r->at = at;
        return bad(r, "not a type of an argument here");
    }
    s->count++;
    if (is_host)
        return VM_OK;
    p->value = s->values++;
    return p->type == VM_T_BUF || p->type == VM_T_CBUF ? take_bytes(r, p) : VM_OK;
}

/* Each buffer has its size or an integer behind it. */
static int check_buffers(const reader *r, const vm_signature *s)
{
    for (unsigned i = 0; i < s->count; i++) {
        const vm_param *p = &s->params[i];
        if ((p->type != VM_T_BUF && p->type != VM_T_CBUF) || p->has_bytes)
            continue;
        if (i + 1 >= s->count || s->params[i + 1].type < VM_T_U8 || s->params[i + 1].type > VM_T_I64)
            return bad(r, "a buffer without a length behind it");
    }
    return VM_OK;
}

int vm_signature_parse(const char *text, bool has_host, const char *function, vm_signature *s)
{
    reader r = { text, text, function };
    if (!text)
        return vm_fail(VM_E_INVALID, "%s: signature is NULL", function);
    memset(s, 0, sizeof *s);
    int status = take_convention(&r, &s->convention);
    if (!status)
        status = take_type(&r, &s->result);
    if (!status && s->result >= VM_T_STR)
        status = bad(&r, "not a type of a result");
    if (!status && !take(&r, '('))
        status = bad(&r, "no (");
    if (!status && !take(&r, ')')) {
        const char *begin = r.at;
        skip(&r);
        if (!strncmp(r.at, "void", 4) && word_length(r.at) == 4)       /* C's way of none */
            r.at += 4;
        else
            for (r.at = begin; !(status = take_param(&r, s, has_host)) && take(&r, ',');)
                continue;
        if (!status && !take(&r, ')'))
            status = bad(&r, "no )");
    }
    skip(&r);
    if (!status && *r.at)
        status = bad(&r, "something more");
    return status ? status : check_buffers(&r, s);
}

/* ---- places ---- */

typedef struct rules {
    uint8_t word;
    uint8_t gprs, xmms;                /* how many take arguments */
    bool by_position;                  /* Win64: argument n takes register n of either kind */
    uint8_t home;                      /* bytes of the callee's home area */
    bool callee_pops, has_stack;
    uint8_t gpr[6];
} rules;

static const rules of[VM_CONV_COUNT] = {
    [VM_CONV_SYSV] = { 8, 6, 8, false, 0, false, true, { X86_RDI, X86_RSI, X86_RDX, X86_RCX, X86_R8, X86_R9 } },
    [VM_CONV_WIN64] = { 8, 4, 4, true, 32, false, true, { X86_RCX, X86_RDX, X86_R8, X86_R9 } },
    [VM_CONV_CDECL] = { 4, 0, 0, false, 0, false, true, { 0 } },
    [VM_CONV_STDCALL] = { 4, 0, 0, false, 0, true, true, { 0 } },
    [VM_CONV_HYPER64] = { 8, 6, 8, false, 0, false, false, { X86_RBX, X86_RCX, X86_RDX, X86_RSI, X86_RDI, X86_R8 } },
    [VM_CONV_HYPER32] = { 4, 5, 8, false, 0, false, false, { X86_RBX, X86_RCX, X86_RDX, X86_RSI, X86_RDI } },
};

static int place_values(const vm_signature *s, const rules *rule, const char *function, vm_layout *l)
{
    unsigned gprs = 0, xmms = 0, stack = rule->home;
    for (unsigned i = 0; i < s->count; i++) {
        const vm_param *p = &s->params[i];
        if (p->type == VM_T_CPU || p->type == VM_T_USER)
            continue;
        vm_place *at = &l->places[p->value];
        unsigned bytes = vm_type_bytes(p->type, rule->word);
        bool is_float = vm_type_is_float(p->type);
        unsigned *next = is_float ? &xmms : &gprs, limit = is_float ? rule->xmms : rule->gprs;
        if (rule->by_position)
            gprs = xmms = p->value;
        bool is_wide = !rule->has_stack && !is_float && bytes > rule->word;
        if (*next < limit && !is_wide) {
            *at = (vm_place){ is_float ? VM_PLACE_XMM : VM_PLACE_GPR, 8, is_float ? (uint16_t)*next : rule->gpr[*next] };
            ++*next;
            l->xmm_count = is_float ? (uint8_t)*next : l->xmm_count;
        } else if (rule->has_stack) {
            unsigned slot = bytes > rule->word ? bytes : rule->word;
            *at = (vm_place){ VM_PLACE_STACK, (uint8_t)slot, (uint16_t)(rule->word + stack) };
            stack += slot;
        } else {
            return vm_fail(VM_E_INVALID, "%s: argument %u has no register in a hypercall", function, p->value + 1u);
        }
    }
    l->stack_bytes = (uint16_t)stack;
    return VM_OK;
}

int vm_signature_place(const vm_signature *s, unsigned code_size, bool hyper, const char *function, vm_layout *l)
{
    vm_convention c = (vm_convention)s->convention;
    if (code_size == 2 && !hyper)
        return vm_fail(VM_E_UNSUPPORTED, "%s: the vCPU is in 16-bit code", function);
    if (hyper)
        c = code_size == 8 ? VM_CONV_HYPER64 : VM_CONV_HYPER32;
    else if (c == VM_CONV_NONE)
        c = code_size == 8 ? VM_CONV_SYSV : VM_CONV_CDECL;
    const rules *rule = &of[c];
    if (!hyper && rule->word != code_size)
        return vm_fail(VM_E_UNSUPPORTED, "%s: %s is not a convention of %u-bit code", function, conventions[c], 8 * code_size);
    memset(l, 0, sizeof *l);
    l->convention = c;
    l->word = rule->word;
    int status = place_values(s, rule, function, l);
    l->popped = rule->callee_pops ? l->stack_bytes : 0;
    return status;
}

/* ---- for libffi ---- */

int vm_signature_cif(const vm_signature *s, const char *function, ffi_cif *cif, ffi_type **list)
{
    for (unsigned i = 0; i < s->count; i++)
        list[i] = vm_type_ffi(s->params[i].type);
    if (ffi_prep_cif(cif, FFI_DEFAULT_ABI, s->count, vm_type_ffi(s->result), list) != FFI_OK)
        return vm_fail(VM_E_HOST, "%s: libffi cannot call that signature", function);
    return VM_OK;
}

bool vm_param_bytes(const vm_signature *s, unsigned param, const vm_value *values, uint64_t *bytes)
{
    const vm_param *p = &s->params[param];
    if (p->has_bytes) {
        *bytes = p->bytes;
        return true;
    }
    const vm_param *length = &s->params[param + 1];
    uint64_t n = vm_type_extend(length->type, 8, values[length->value].u);
    *bytes = n;
    return !(types[length->type].is_signed && (int64_t)n < 0);
}
