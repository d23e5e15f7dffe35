#!/bin/sh
# linux.sh - real guests on one backend: Debian's kernels to /init and through some commands, memtest86+, SeaBIOS. Sourced by
# the linux_* scripts with $backend set. Skips, with the reason, what cannot be had here.
builddir=${top_builddir:-.}
srcdir=${top_srcdir:-.}
[ "${TEST_BACKEND:-$backend}" = "$backend" ] || { echo "skip $backend/guests: TEST_BACKEND is $TEST_BACKEND"; exit 0; }
# TEST_MMU: a strategy for all of them.
vmrun="$builddir/examples/vmrun${TEST_MMU:+ --mmu $TEST_MMU}"
guests=${LIBVM_GUESTS:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/libvm/guests}
patience=${TEST_PATIENCE:-1}
limit=$((${GUEST_TIMEOUT:-300} * patience))
# TEST_GUESTS: a shell pattern for the names of guests, without the backend. TEST_APPEND: what else is on Linux's command line.
wanted() { case $1 in ${TEST_GUESTS:-*}) ;; *) return 1 ;; esac; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# What the guest does, and what must come out: sums and quotients by arithmetic, the checksum by the host's own md5sum. (The
# kernel's command line knows no escapes: no double quotes here.)
commands='i=0; s=0; while [ $i -lt 100 ]; do i=$((i+1)); s=$((s+i)); done; echo sum=$s;
 md5sum /bin/busybox; for i in 1 2 3 4 5 6 7 8; do (echo fork$i; sleep 0) & done; wait; echo forks=done;
 echo pipe=$(seq 1000 | grep 7 | sort -r | wc -l);
 awk '\''BEGIN { s = 0; for (i = 1; i <= 1000; i++) s += 1 / i; print 22 / 7, s }'\'';
 echo cpus=$(grep -c ^processor /proc/cpuinfo); dd if=/dev/zero of=/tmp/z bs=64k count=32 2>/dev/null; md5sum /tmp/z; echo end=here'
commands=$(echo "$commands" | tr '\n' ' ')
zeroes=$(head -c 2097152 /dev/zero | md5sum | cut -c 1-32)

# expect NAME FILE PATTERN...: every pattern is in the console's output, and no complaint of the kernel.
expect() {
    name=$1 file=$2
    shift 2
    for pattern in "$@"; do
        if ! grep -aqE -e "$pattern" "$file"; then
            echo "FAIL $name: no '$pattern' on the console; it ended: $(tail -c 400 "$file" | tr '\r\n\033' '  ?')"
            return 1
        fi
    done
    complaint=$(grep -aE 'BUG:|WARNING:|Oops|Call Trace|segfault|self-detected stall|Kernel panic|traps:' "$file" | head -n 1)
    if [ -n "$complaint" ]; then
        echo "FAIL $name: $complaint"
        return 1
    fi
}

# linux NAME KERNEL ARCH CPUS [OPTIONS...]
linux() {
    wanted "$1" || return 0
    name=$backend/$1 kernel=$guests/vmlinuz-$2 arch=$3 cpus=$4
    shift 4
    if [ ! -e "$kernel" ] || [ ! -e "$guests/initramfs-$arch" ]; then
        echo "skip $name: no guest files: run tests/guests/fetch (needs a network)"
        return
    fi
    timeout -k 5 $((limit + 20)) $vmrun --backend "$backend" --timeout "$limit" --memory 512M --cpus "$cpus" \
        --kernel "$kernel" --initrd "$guests/initramfs-$arch" \
        --append "console=ttyS0${TEST_APPEND:+ $TEST_APPEND} run=\"$commands\"" "$@" >"$work/out" 2>&1 </dev/null
    status=$?
    sum=$(md5sum <"$guests/busybox-$arch" | cut -c 1-32)
    expect "$name" "$work/out" 'init: reached' 'sum=5050' "$sum  /bin/busybox" fork8 'forks=done' 'pipe=271' '3.14286 7.48547' \
        "cpus=$cpus" "$zeroes  /tmp/z" 'end=here' 'commands ended with status 0' 'Power down' || return
    if [ $status -ne 0 ]; then echo "FAIL $name: exit status $status, not 0"; else echo "ok $name"; fi
}

# run_until PATTERN FILE OPTIONS...: a guest that never ends by itself runs until FILE shows the pattern.
run_until() {
    pattern=$1 file=$2
    shift 2
    : >"$file"
    $vmrun --backend "$backend" --timeout "$limit" "$@" >"$work/out" 2>&1 </dev/null &
    pid=$!
    while kill -0 $pid 2>/dev/null && ! grep -aqE "$pattern" "$file"; do sleep 0.2; done
    kill $pid 2>/dev/null
    wait $pid 2>/dev/null
}

# memtest NAME IMAGE: over 16 MiB it must get to its third test without an error. It never ends by itself, and starts with
# some seconds in which it waits for a key: it is stopped when it has got that far.
memtest() {
    wanted "$1" || return 0
    name=$backend/$1 image=$guests/$2
    if [ ! -e "$image" ]; then
        echo "skip $name: no guest files: run tests/guests/fetch (needs a network)"
        return
    fi
    run_until '#[3456789]' "$work/out" --memory 16M --kernel "$image" --append console=ttyS0,115200
    expect "$name" "$work/out" 'Memtest86\+' '#[3456789]' 'Errors: 0' || return
    if grep -aqE 'Errors: *[1-9]' "$work/out"; then echo "FAIL $name: it found errors in memory"; else echo "ok $name"; fi
}

# seabios: from the reset vector to where it finds nothing to boot.
seabios() {
    wanted seabios || return 0
    name=$backend/seabios
    if [ ! -e "$guests/bios.bin" ]; then
        echo "skip $name: no guest files: run tests/guests/fetch (needs a network)"
        return
    fi
    for image in bios.bin bios-256k.bin; do
        run_until 'enter handle_18' "$work/debug" --bios "$guests/$image" --debugcon "$work/debug"
        expect "$name" "$work/debug" 'SeaBIOS \(version' 'e820 map has' 'All threads complete' 'enter handle_18' || return
    done
    echo "ok $name"
}

# until_text NAME FILE PATTERN OPTIONS...: a guest that does not end by itself is stopped when PATTERN is on its console.
until_text() {
    wanted "$1" || return 0
    name=$backend/$1 image=$guests/$2 pattern=$3
    shift 3
    if [ ! -e "$image" ]; then
        echo "skip $name: no guest files: run tests/guests/fetch (needs a network)"
        return
    fi
    run_until "$pattern" "$work/out" --memory 128M "$@" "$image"
    if grep -aqE "$pattern" "$work/out"; then echo "ok $name"
    else echo "FAIL $name: no '$pattern' on the console; it ended: $(tail -c 400 "$work/out" | tr '\r\n\033' '  ?')"
    fi
}

if ! $vmrun --help >/dev/null; then
    echo "FAIL $backend/vmrun: it does not start"
    exit 0
fi
# A boot sector that does `mov al, 7; out 0xf4, al` tells whether the backend is there at all.
{ printf '\260\007\346\364\364'; head -c 505 /dev/zero; printf '\125\252'; } >"$work/probe"
$vmrun --backend "$backend" --timeout $((20 * patience)) --kernel "$work/probe" >"$work/out" 2>&1 </dev/null
if [ $? -ne 7 ]; then
    echo "skip $backend/guests: $(head -n 1 "$work/out" | cut -c 1-200)"
    exit 0
fi
