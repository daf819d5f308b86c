# Sourced by the scripts that begin with a set-up, as `usage "$@"`: with -h or --help among the words it prints the comment at
# the head of the script that was called, and leaves before anything is set up.
usage() {
    local word line
    for word in "$@"; do
        if [[ "$word" != -h && "$word" != --help ]]; then continue; fi
        while IFS= read -r line; do
            if [[ "$line" == "#!"* ]]; then continue; fi
            if [[ "$line" != "#"* ]]; then break; fi
            line="${line#"#"}"
            printf '%s\n' "${line# }"
        done <"$0"
        exit 0
    done
}
