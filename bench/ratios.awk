# ratios.awk - a table and JSON of times in a guest, as multiples of native ones and beside a peer's. Files named native, libvm
# and qemu hold lines of a name, microseconds and a checksum of the result; results must be the same, the peer may be absent.
#
#   awk -v benchmark=NAME -v title=TEXT -v each=NAME -v backend=NAME -v first=N -v goals=TEXT -v json=FILE -f ratios.awk NATIVE LIBVM QEMU
#
# The means are geometric, of the first N lines (0: of all).
FILENAME ~ /native$/ { order[++count] = $1; native[$1] = $2; want[$1] = $3 }
FILENAME ~ /libvm$/ { libvm[$1] = $2; if (want[$1] != $3) wrong[$1] = 1 }
FILENAME ~ /qemu$/ { qemu[$1] = $2 }
function cell(a, b) { return a && b ? sprintf("%.2f", a / b) : "-" }
function js(a, b) { return a && b ? sprintf("%.4f", a / b) : "null" }
END {
    printf "%-14s%14s%14s%20s\n", title, backend "/native", "tcg/native", "times faster than tcg"
    printf "{\"benchmark\": \"%s\", \"backend\": \"%s\", \"cells\": [", benchmark, backend >json
    if (!first) first = count
    for (i = 1; i <= count; i++) {
        k = order[i]
        printf "%-14s%14s%14s%20s%s\n", k, cell(libvm[k], native[k]), cell(qemu[k], native[k]), cell(qemu[k], libvm[k]), (wrong[k] ? "  WRONG RESULT" : "")
        printf "%s\n  {\"%s\": \"%s\", \"native_us\": %s, \"libvm_times_native\": %s, \"tcg_times_native\": %s, \"times_faster_than_tcg\": %s}", \
            (i > 1 ? "," : ""), each, k, native[k], js(libvm[k], native[k]), js(qemu[k], native[k]), js(qemu[k], libvm[k]) >json
        if (i <= first && libvm[k] && native[k]) { a += log(libvm[k] / native[k]); n++ }
        if (i <= first && libvm[k] && qemu[k]) { b += log(qemu[k] / libvm[k]); m++ }
        bad += wrong[k] || !libvm[k]
    }
    means = n && n == first ? sprintf("%.2f", exp(a / n)) : "-"
    faster = m && m == first ? sprintf("%.2f", exp(b / m)) : "-"
    printf "%-14s%14s%14s%20s%s\n", (first < count ? "mean of " first : "mean"), means, "", faster, goals
    printf "\n], \"mean_times_native\": %s, \"mean_times_faster_than_tcg\": %s}\n", (means == "-" ? "null" : means), (faster == "-" ? "null" : faster) >json
    exit bad ? 1 : 0
}
