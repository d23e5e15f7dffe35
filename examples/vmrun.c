/* vmrun - runs a PC in a terminal: a kernel or firmware on one of libvm's backends, its first serial port on standard input
 * and output. Uses the public interface only.
 *
 * One thread a vCPU runs the guest, one feeds the console, and the main thread waits for the verdict: the first event that
 * ends the run. A reset is carried out between runs: all vCPUs are stopped, the machine reset and the image loaded again.
 */
#define _GNU_SOURCE
#include <libvm/libvm.h>

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_BAD_INPUT = 1, EXIT_GUEST_DIED = 2, EXIT_TIMEOUT = 124 };

typedef enum verdict { RUNNING, POWERED_OFF, RESET_ASKED, GUEST_CODE, DIED, TIMED_OUT, LEFT } verdict;

typedef struct vmrun {
    vm_options machine_options;
    vm_boot_options boot;
    const char *debugcon;
    unsigned trace;
    const char *gdb_address, *record, *replay;
    uint64_t gdb_reverse;
    vm_gdb *gdb;
    bool has_trace, want_stats, no_reboot, gdb_runs;
    double timeout;

    vm_machine *machine;
    pthread_t vcpu_threads[VM_MAX_VCPUS], console_thread;
    bool has_console_thread;
    int wake[2], debug_fd, log_fd;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    verdict verdict;                    /* under lock */
    int status;                         /* under lock */
    _Atomic bool stopping;              /* vCPU threads leave */
} vmrun;

static struct termios saved_terminal;
static volatile sig_atomic_t terminal_is_raw;

/* A message on a line of its own; a raw terminal needs its carriage returns. */
static int complain(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs(terminal_is_raw ? "\r\nvmrun: " : "vmrun: ", stderr);
    vfprintf(stderr, format, args);
    fputs(terminal_is_raw ? "\r\n" : "\n", stderr);
    va_end(args);
    return EXIT_BAD_INPUT;
}

/* ---- the terminal ---- */

static void restore_terminal(void)
{
    if (terminal_is_raw) tcsetattr(STDIN_FILENO, TCSAFLUSH, &saved_terminal);
    terminal_is_raw = 0;
}

static void restore_and_die(int number)
{
    restore_terminal();
    signal(number, SIG_DFL);
    raise(number);
}

static void make_terminal_raw(void)
{
    static const int deadly[] = {SIGHUP, SIGINT, SIGQUIT, SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGTERM};
    if (!isatty(STDIN_FILENO) || tcgetattr(STDIN_FILENO, &saved_terminal) != 0) return;
    for (size_t i = 0; i < sizeof deadly / sizeof *deadly; i++) signal(deadly[i], restore_and_die);
    atexit(restore_terminal);
    struct termios raw = saved_terminal;
    cfmakeraw(&raw);
    terminal_is_raw = 1;
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &raw);
}

/* ---- the end of a run ---- */

static void decide(vmrun *r, verdict v, int status)
{
    pthread_mutex_lock(&r->lock);
    if (r->verdict == RUNNING) {
        r->verdict = v;
        r->status = status;
        pthread_cond_signal(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
}

static void report_death(vm_vcpu *cpu, const vm_exit *exit)
{
    char line[256];
    vm_exit_format(exit, line, sizeof line);
    complain("vCPU %u stopped: %s", vm_vcpu_index(cpu), line);
}

/* True while the vCPU should run on. */
static bool handle_exit(vmrun *r, vm_vcpu *cpu, const vm_exit *exit)
{
    switch (exit->reason) {
    case VM_EXIT_POWEROFF: decide(r, POWERED_OFF, 0); return false;
    case VM_EXIT_RESET: decide(r, RESET_ASKED, 0); return false;
    case VM_EXIT_GUEST_EXIT: decide(r, GUEST_CODE, (int)(exit->guest_exit.code & 0xff)); return false;
    case VM_EXIT_KICK: case VM_EXIT_IO: case VM_EXIT_MMIO: case VM_EXIT_UNMAPPED: return !r->stopping;
    case VM_EXIT_REPLAY: decide(r, LEFT, exit->replay.status == VM_OK ? 0 : complain("%s", vm_errmsg())); return false;
    default: report_death(cpu, exit); decide(r, DIED, EXIT_GUEST_DIED); return false;
    }
}

typedef struct vcpu_start { vmrun *run; vm_vcpu *cpu; } vcpu_start;

static void *run_vcpu(void *argument)
{
    vcpu_start start = *(vcpu_start *)argument;
    free(argument);
    vm_exit exit = VM_EXIT_INIT;
    do {
        if (vm_vcpu_run(start.cpu, NULL, &exit) != VM_OK) {
            complain("vCPU %u: %s", vm_vcpu_index(start.cpu), vm_errmsg());
            decide(start.run, DIED, EXIT_GUEST_DIED);
            break;
        }
    } while (handle_exit(start.run, start.cpu, &exit));
    return NULL;
}

/* ---- the console ---- */

static void write_all(int fd, const uint8_t *bytes, size_t count)
{
    while (count) {
        ssize_t n = write(fd, bytes, count);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            if (errno == EAGAIN) poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 1000);
            continue;
        }
        if (n <= 0) return;
        bytes += n;
        count -= (size_t)n;
    }
}

static void console_output(void *user, const uint8_t *bytes, size_t count) { write_all(STDOUT_FILENO, bytes, count); }
static void debug_output(void *user, const uint8_t *bytes, size_t count) { write_all(((vmrun *)user)->debug_fd, bytes, count); }

static void send_input(vmrun *r, const uint8_t *bytes, size_t count)
{
    while (count && !r->stopping) {
        int taken = vm_serial_input(r->machine, 0, bytes, count);
        if (taken < 0 && taken != VM_E_BUSY) return;
        if (taken <= 0) { nanosleep(&(struct timespec){0, 5000000}, NULL); continue; }
        bytes += taken;
        count -= (size_t)taken;
    }
}

static void console_help(void)
{
    static const char text[] = "\r\nCtrl-A X  leave\r\nCtrl-A H  this help\r\nCtrl-A A  send Ctrl-A\r\n";
    write_all(STDOUT_FILENO, (const uint8_t *)text, sizeof text - 1);
}

/* Ctrl-A is the escape key, on a terminal only. Returns false when the user leaves. */
static bool feed(vmrun *r, const uint8_t *bytes, size_t count, bool *escaped)
{
    for (size_t i = 0; i < count; i++) {
        if (!terminal_is_raw) { send_input(r, bytes + i, count - i); return true; }
        if (!*escaped) {
            *escaped = bytes[i] == 1;
            if (!*escaped) send_input(r, bytes + i, 1);
            continue;
        }
        *escaped = false;
        switch (bytes[i] | 0x20) {
        case 'x': decide(r, LEFT, 0); return false;
        case 'h': case '?' | 0x20: console_help(); break;
        case 'a': case 1 | 0x20: send_input(r, (const uint8_t *)"\1", 1); break;
        default: break;
        }
    }
    return true;
}

static void *run_console(void *argument)
{
    vmrun *r = argument;
    bool escaped = false;
    struct pollfd fds[2] = {{.fd = r->wake[0], .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    uint8_t bytes[256];
    while (poll(fds, 2, -1) >= 0 || errno == EINTR) {
        if (fds[0].revents) break;
        if (!fds[1].revents) continue;
        ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n <= 0) { fds[1].fd = -1; continue; }              /* end of input: the guest runs on */
        if (!feed(r, bytes, (size_t)n, &escaped)) break;
    }
    return NULL;
}

/* ---- under a debugger: its stub drives the vCPUs, on one thread of ours ---- */

static int gdb_reset(void *user, vm_machine *m)
{
    vmrun *r = user;
    int status = vm_reset(m);
    return status == VM_OK ? vm_boot_image(m, &r->boot) : status;
}

static vm_gdb_action gdb_exit(void *user, vm_vcpu *cpu, vm_exit *exit)
{
    vmrun *r = user;
    (void)cpu;
    return exit->reason == VM_EXIT_RESET && r->no_reboot ? VM_GDB_END : VM_GDB_DEFAULT;
}

static void *run_gdb(void *argument)
{
    vmrun *r = argument;
    vm_exit exit = VM_EXIT_INIT;
    if (vm_gdb_serve(r->gdb, &exit) != VM_OK) {
        complain("%s", vm_errmsg());
        decide(r, DIED, EXIT_GUEST_DIED);
    } else if (exit.reason == VM_EXIT_KICK) {
        decide(r, LEFT, 0);
    } else {
        handle_exit(r, vm_vcpu_get(r->machine, 0), &exit);
    }
    return NULL;
}

static bool open_gdb(vmrun *r)
{
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    if (!r->gdb_address) return true;
    o.runs_alone = r->gdb_runs;
    o.reverse_interval = r->gdb_reverse;
    o.on_exit = gdb_exit;
    o.on_reset = gdb_reset;
    o.user = r;
    if (vm_gdbstub(r->machine, r->gdb_address, &o, &r->gdb) != VM_OK) {
        complain("%s", vm_errmsg());
        return false;
    }
    complain("(gdb) target remote %s", vm_gdb_address(r->gdb));
    return true;
}

/* ---- running ---- */

static bool start_vcpus(vmrun *r)
{
    unsigned count = vm_vcpu_count(r->machine);
    if (r->gdb) return pthread_create(&r->vcpu_threads[0], NULL, run_gdb, r) == 0;
    for (unsigned i = 0; i < count; i++) {
        vcpu_start *start = malloc(sizeof *start);
        if (start) *start = (vcpu_start){r, vm_vcpu_get(r->machine, i)};
        if (!start || pthread_create(&r->vcpu_threads[i], NULL, run_vcpu, start) != 0) {
            free(start);
            decide(r, DIED, complain("no thread for vCPU %u: %s", i, strerror(errno)));
            r->stopping = true;
            for (unsigned k = 0; k < i; k++) vm_vcpu_kick(vm_vcpu_get(r->machine, k));
            for (unsigned k = 0; k < i; k++) pthread_join(r->vcpu_threads[k], NULL);
            return false;
        }
    }
    return true;
}

static void stop_vcpus(vmrun *r)
{
    unsigned count = vm_vcpu_count(r->machine);
    r->stopping = true;
    if (r->gdb) {
        vm_gdb_stop(r->gdb);
        pthread_join(r->vcpu_threads[0], NULL);
        return;
    }
    for (unsigned i = 0; i < count; i++) vm_vcpu_kick(vm_vcpu_get(r->machine, i));
    for (unsigned i = 0; i < count; i++) pthread_join(r->vcpu_threads[i], NULL);
}

static struct timespec end_of(double seconds)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    if (seconds > 1e9) seconds = 1e9;
    t.tv_sec += (time_t)seconds;
    t.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (t.tv_nsec >= 1000000000) { t.tv_sec++; t.tv_nsec -= 1000000000; }
    return t;
}

static void wait_for_verdict(vmrun *r, const struct timespec *end)
{
    pthread_mutex_lock(&r->lock);
    while (r->verdict == RUNNING) {
        int error = r->timeout > 0 ? pthread_cond_timedwait(&r->changed, &r->lock, end) : pthread_cond_wait(&r->changed, &r->lock);
        if (error == ETIMEDOUT && r->verdict == RUNNING) {
            r->verdict = TIMED_OUT;
            r->status = EXIT_TIMEOUT;
        }
    }
    pthread_mutex_unlock(&r->lock);
}

/* A kick that arrived after its thread had left stays pending: the run after a reset sees it as one empty turn. */
static bool restart(vmrun *r)
{
    if (vm_reset(r->machine) != VM_OK || vm_boot_image(r->machine, &r->boot) != VM_OK) {
        complain("after a reset: %s", vm_errmsg());
        r->status = EXIT_BAD_INPUT;
        return false;
    }
    r->verdict = RUNNING;
    r->stopping = false;
    return true;
}

static void run(vmrun *r)
{
    struct timespec end = end_of(r->timeout);
    do {
        if (!start_vcpus(r)) return;
        if (!r->has_console_thread && r->wake[0] >= 0)
            r->has_console_thread = pthread_create(&r->console_thread, NULL, run_console, r) == 0;
        wait_for_verdict(r, &end);
        stop_vcpus(r);
    } while (r->verdict == RESET_ASKED && !r->no_reboot && !r->record && !r->replay && restart(r));
    if (r->has_console_thread) {
        write_all(r->wake[1], (const uint8_t *)"", 1);
        pthread_join(r->console_thread, NULL);
    }
}

static void print_stats(vmrun *r, double seconds)
{
    fprintf(stderr, "\n%-16s %s, %s, %u vCPU%s, %.3f s\n", "vmrun", vm_backend_name(vm_machine_backend(r->machine)),
            vm_mmu_current(r->machine), vm_vcpu_count(r->machine), vm_vcpu_count(r->machine) == 1 ? "" : "s", seconds);
    const char *name, *text;
    for (unsigned i = 0; (name = vm_stat_name(i, &text)) != NULL; i++) {
        uint64_t value;
        if (vm_stats(r->machine, name, &value) == VM_OK) fprintf(stderr, "%-16s %20" PRIu64 "  %s\n", name, value, text);
    }
}

/* ---- the command line ---- */

static const char help_text[] =
    "Usage: vmrun [options]\n"
    "Runs a virtual PC; its first serial port is the terminal. Ctrl-A X leaves, Ctrl-A H helps.\n\n"
    "  --kernel FILE      Linux bzImage, Multiboot or PVH kernel, ELF program or boot sector\n"
    "  --initrd F[,F]     initial RAM disk, or modules; \"file args\" gives a module a command line\n"
    "  --append STRING    kernel command line\n"
    "  --bios FILE        firmware, started at the reset vector\n"
    "  --backend NAME     auto (default), kvm, jit or interp\n"
    "  --mmu NAME         MMU strategy of the software backends\n"
    "  --memory SIZE      RAM, with suffix K, M or G (default 512M)\n"
    "  --memory-file FILE that RAM is, at least as long; in hugetlbfs: huge pages\n"
    "  --code-cache SIZE  the JIT's room for translated code (default 32M)\n"
    "  --cpus N           virtual CPUs (default 1)\n"
    "  --cpu MODEL        CPU model (default max)\n"
    "  --linux-entry N    start a Linux kernel at its 16-, 32- or 64-bit entry\n"
    "  --debugcon FILE    write port 0xE9 and 0x402 output to a file; - is standard error\n"
    "  --trace LIST       trace to standard error: decode,ir,mcode,exit,mmio,irq,mmu or all\n"
    "  --stats            print counters at the end\n"
    "  --timeout SECONDS  stop after that time\n"
    "  --no-reboot        leave when the guest asks for a reset\n"
    "  --gdb ADDRESS      wait for a debugger: \"target remote ADDRESS\"; HOST:PORT on the loopback, :PORT, or the path of\n"
    "                     a Unix socket\n"
    "  --gdb-run          run while no debugger is there\n"
    "  --record FILE      write down what happens to the machine from outside, up to its end or reset (one CPU, jit or interp)\n"
    "  --replay FILE      do the same again; with the other options as they were\n"
    "  --gdb-reverse N    replaying: let the debugger go backwards, with a snapshot every N instructions\n"
    "  --help, --version\n\n"
    "Exit status: 0 the guest powered off (or Ctrl-A X, or a reset with --no-reboot); the code it wrote to the exit\n"
    "device at port 0xF4; 124 timeout; 1 bad input; 2 the guest stopped for good (triple fault, HLT with interrupts off).\n";

static bool parse_size(const char *text, uint64_t *bytes)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    if (end == text || errno || *text == '-') return false;
    unsigned shift = 0;
    switch (*end) {
    case 'k': case 'K': shift = 10; end++; break;
    case 'm': case 'M': shift = 20; end++; break;
    case 'g': case 'G': shift = 30; end++; break;
    case 0: break;
    default: return false;
    }
    if (*end || value > UINT64_MAX >> shift) return false;
    *bytes = (uint64_t)value << shift;
    return true;
}

static bool parse_number(const char *text, uint64_t max, uint64_t *value)
{
    return parse_size(text, value) && *value <= max && strspn(text, "0123456789") == strlen(text);
}

static bool parse_backend(const char *text, vm_backend *backend)
{
    static const char *const names[] = {"auto", "kvm", "jit", "interp"};
    static const vm_backend values[] = {VM_BACKEND_AUTO, VM_BACKEND_KVM, VM_BACKEND_JIT, VM_BACKEND_INTERP};
    for (unsigned i = 0; i < 4; i++)
        if (strcmp(text, names[i]) == 0) { *backend = values[i]; return true; }
    return false;
}

enum { OPT_KERNEL = 256, OPT_INITRD, OPT_APPEND, OPT_BIOS, OPT_BACKEND, OPT_MMU, OPT_MEMORY, OPT_MEMORY_FILE, OPT_CODE_CACHE,
       OPT_CPUS, OPT_CPU, OPT_ENTRY, OPT_DEBUGCON, OPT_TRACE, OPT_STATS, OPT_TIMEOUT, OPT_NO_REBOOT, OPT_GDB, OPT_GDB_RUN,
       OPT_RECORD, OPT_REPLAY, OPT_GDB_REVERSE, OPT_HELP, OPT_VERSION };
static const struct option long_options[] = {
    {"kernel", required_argument, NULL, OPT_KERNEL},   {"initrd", required_argument, NULL, OPT_INITRD},
    {"append", required_argument, NULL, OPT_APPEND},   {"bios", required_argument, NULL, OPT_BIOS},
    {"backend", required_argument, NULL, OPT_BACKEND}, {"mmu", required_argument, NULL, OPT_MMU},
    {"memory-file", required_argument, NULL, OPT_MEMORY_FILE}, {"code-cache", required_argument, NULL, OPT_CODE_CACHE},
    {"memory", required_argument, NULL, OPT_MEMORY},   {"cpus", required_argument, NULL, OPT_CPUS},
    {"cpu", required_argument, NULL, OPT_CPU},         {"linux-entry", required_argument, NULL, OPT_ENTRY},
    {"debugcon", required_argument, NULL, OPT_DEBUGCON}, {"trace", required_argument, NULL, OPT_TRACE},
    {"stats", no_argument, NULL, OPT_STATS},           {"timeout", required_argument, NULL, OPT_TIMEOUT},
    {"no-reboot", no_argument, NULL, OPT_NO_REBOOT},   {"gdb", required_argument, NULL, OPT_GDB},
    {"gdb-run", no_argument, NULL, OPT_GDB_RUN},       {"record", required_argument, NULL, OPT_RECORD},
    {"replay", required_argument, NULL, OPT_REPLAY},   {"gdb-reverse", required_argument, NULL, OPT_GDB_REVERSE},
    {"help", no_argument, NULL, OPT_HELP},             {"version", no_argument, NULL, OPT_VERSION},
    {NULL, 0, NULL, 0}};

/* One option; 0, or the exit status for a value that makes no sense. */
static int take_option(vmrun *r, int option, const char *value)
{
    uint64_t number = 0;
    char *end;
    switch (option) {
    case OPT_KERNEL: r->boot.kernel = value; return 0;
    case OPT_INITRD: r->boot.initrd = value; return 0;
    case OPT_APPEND: r->boot.cmdline = value; return 0;
    case OPT_BIOS: r->boot.bios = value; return 0;
    case OPT_MMU: r->machine_options.mmu = value; return 0;
    case OPT_MEMORY_FILE: r->machine_options.ram_file = value; return 0;
    case OPT_CPU: r->machine_options.cpu_model = value; return 0;
    case OPT_DEBUGCON: r->debugcon = value; return 0;
    case OPT_STATS: r->want_stats = true; return 0;
    case OPT_NO_REBOOT: r->no_reboot = true; return 0;
    case OPT_GDB: r->gdb_address = value; return 0;
    case OPT_GDB_RUN: r->gdb_runs = true; return 0;
    case OPT_RECORD: r->record = value; return 0;
    case OPT_REPLAY: r->replay = value; return 0;
    case OPT_GDB_REVERSE:
        if (parse_size(value, &r->gdb_reverse) && r->gdb_reverse) return 0;
        return complain("--gdb-reverse %s: not a number of instructions", value);
    case OPT_BACKEND:
        if (parse_backend(value, &r->machine_options.backend)) return 0;
        return complain("--backend %s: it is auto, kvm, jit or interp", value);
    case OPT_MEMORY:
        if (parse_size(value, &r->machine_options.ram_bytes)) return 0;
        return complain("--memory %s: not a size (like 512M or 2G)", value);
    case OPT_CODE_CACHE:
        if (parse_size(value, &r->machine_options.code_cache_bytes)) return 0;
        return complain("--code-cache %s: not a size (like 512K or 64M)", value);
    case OPT_CPUS:
        if (parse_number(value, VM_MAX_VCPUS, &number) && number) { r->machine_options.vcpus = (uint32_t)number; return 0; }
        return complain("--cpus %s: not a number from 1 to %u", value, VM_MAX_VCPUS);
    case OPT_ENTRY:
        if (parse_number(value, 64, &number)) { r->boot.linux_entry = (uint32_t)number; return 0; }
        return complain("--linux-entry %s: it is 16, 32 or 64", value);
    case OPT_TRACE:
        r->has_trace = true;
        if (vm_trace_parse(value, &r->trace) == VM_OK) return 0;
        return complain("--trace %s: %s", value, vm_errmsg());
    case OPT_TIMEOUT:
        r->timeout = strtod(value, &end);
        if (end != value && !*end && r->timeout > 0) return 0;
        return complain("--timeout %s: not a number of seconds", value);
    default: return complain("see vmrun --help");
    }
}

/* -1: go on; otherwise the exit status. */
static int parse_command_line(vmrun *r, int argc, char **argv)
{
    int option;
    while ((option = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        if (option == OPT_HELP || option == 'h') { fputs(help_text, stdout); return 0; }
        if (option == OPT_VERSION) { printf("vmrun (libvm %s)\n", vm_version()); return 0; }
        int status = take_option(r, option, optarg);
        if (status) return status;
    }
    if (optind < argc) return complain("%s: unexpected argument; see vmrun --help", argv[optind]);
    if (!r->boot.kernel && !r->boot.bios) return complain("nothing to boot: give --kernel or --bios; see vmrun --help");
    return -1;
}

/* From here on the machine is recorded, or does what a recording says. */
static int open_log(vmrun *r)
{
    if (r->record && r->replay) return complain("--record and --replay at once");
    const char *path = r->record ? r->record : r->replay;
    if (!path) return -1;
    r->log_fd = r->record ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) : open(path, O_RDONLY | O_CLOEXEC);
    if (r->log_fd < 0) return complain("%s: %s", path, strerror(errno));
    int status = r->record ? vm_record(r->machine, r->log_fd, NULL) : vm_replay(r->machine, r->log_fd);
    return status == VM_OK ? -1 : complain("%s: %s", path, vm_errmsg());
}

static void close_log(vmrun *r)
{
    if (r->log_fd < 0) return;
    if (r->record && vm_record_stop(r->machine) != VM_OK) r->status = complain("%s: %s", r->record, vm_errmsg());
    close(r->log_fd);
}

static int prepare(vmrun *r)
{
    if (vm_create(&r->machine_options, &r->machine) != VM_OK) return complain("%s", vm_errmsg());
    if (r->has_trace && vm_trace_set(r->machine, r->trace, NULL, NULL) != VM_OK) return complain("%s", vm_errmsg());
    if (vm_serial_output(r->machine, 0, console_output, r) != VM_OK) return complain("%s", vm_errmsg());
    if (r->debugcon) {
        r->debug_fd = strcmp(r->debugcon, "-") == 0 ? STDERR_FILENO
                                                   : open(r->debugcon, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (r->debug_fd < 0) return complain("%s: %s", r->debugcon, strerror(errno));
        if (vm_debugcon_output(r->machine, debug_output, r) != VM_OK) return complain("%s", vm_errmsg());
    }
    if (vm_boot_image(r->machine, &r->boot) != VM_OK) return complain("%s", vm_errmsg());
    int status = open_log(r);
    if (status >= 0) return status;
    if (!open_gdb(r)) return EXIT_BAD_INPUT;
    if (pipe2(r->wake, O_CLOEXEC) != 0) return complain("pipe: %s", strerror(errno));
    return -1;
}

int main(int argc, char **argv)
{
    vmrun r = {.machine_options = VM_OPTIONS_INIT, .boot = VM_BOOT_OPTIONS_INIT, .wake = {-1, -1}, .debug_fd = -1,
               .log_fd = -1};
    r.machine_options.platform = VM_PLATFORM_PC;
    r.machine_options.ram_bytes = UINT64_C(512) << 20;
    pthread_condattr_t monotonic;
    pthread_mutex_init(&r.lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&r.changed, &monotonic);
    signal(SIGPIPE, SIG_IGN);

    int status = parse_command_line(&r, argc, argv);
    if (status < 0) status = prepare(&r);
    if (status < 0) {
        struct timespec begin, now;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        make_terminal_raw();
        run(&r);
        restore_terminal();
        close_log(&r);
        clock_gettime(CLOCK_MONOTONIC, &now);
        status = r.status;
        if (r.verdict == TIMED_OUT) fprintf(stderr, "\nvmrun: stopped after %g seconds\n", r.timeout);
        if (r.want_stats) print_stats(&r, (double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) * 1e-9);
    }
    vm_gdb_free(r.gdb);
    vm_destroy(r.machine);
    return status;
}
