# shellcheck shell=bash
# Sourced by the launch scripts: options, dry runs, errors.

dry_run=
flags=()  # qlog.main's flags: whatever follows --.

fail() {
    echo "launch/${0##*/}: $*" >&2
    exit 1
}

# parse NAME... -- "$@": sets $some_name from --some-name=VALUE, or to 'true' from --some-name.
# (Its own variables have odd names because it sets the caller's.)
parse() {
    local _known=" " _option
    while [ "$1" != -- ]; do
        _known+="$1 "
        shift
    done
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --help | -h)
                awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
                exit
                ;;
            --dry-run) dry_run=true ;;
            --)
                shift
                flags=("$@")
                return
                ;;
            *)
                _option=${1%%=*}
                _option=${_option#--}
                case "$1 $_known" in
                    --*" ${_option//-/_} "*) ;;
                    *) fail "unknown option $1; qlog's flags follow -- (launch/${0##*/} --help)" ;;
                esac
                if [ "$1" = "--$_option" ]; then
                    printf -v "${_option//-/_}" %s true
                else
                    printf -v "${_option//-/_}" %s "${1#*=}"
                fi
                ;;
        esac
        shift
    done
}

# need NAME...: fails unless every option has a value.
need() {
    local _option
    for _option in "$@"; do
        [ -n "${!_option}" ] || fail "--${_option//_/-} is needed (see launch/${0##*/} --help)"
    done
}

# quote WORD...: one line that a shell reads back as these words.
quote() {
    local word line='' quoted="'\\''"
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quoted}'" ;;
        esac
        line+=" $word"
    done
    echo "${line# }"
}

# number WORD: a step as it is; -1 for anything else, as for a checkpoint that is not there.
number() {
    case $1 in '' | *[!0-9]*) echo -1 ;; *) echo "$1" ;; esac
}

# run COMMAND...: shows the command, and runs it unless this is a dry run.
run() {
    echo "+ $(quote "$@")"
    [ -n "$dry_run" ] || "$@"
}

# workdir_of_flags [PREFIX]: the --workdir in qlog.main's flags, which has to start with PREFIX.
workdir_of_flags() {
    local flag
    for flag in ${flags[@]+"${flags[@]}"}; do
        case $flag in
            --workdir="${1-}"?*)
                echo "${flag#--workdir=}"
                return
                ;;
        esac
    done
    fail "give qlog.main's flags after --, with a --workdir=${1-}... that all hosts see and that" \
        "outlives them: a restarted run resumes from it"
}

# job_name [LETTERS]: a name from the workdir's last part, or the module; gcluster takes 28 letters.
job_name() {
    local name
    case ${flags[0]-} in
        -m) name=${flags[1]-} ;;
        *) name=$(workdir_of_flags) || exit ;;
    esac
    name=$(basename "$name" | tr 'A-Z_.,=' 'a-z----' | tr -cd 'a-z0-9-')
    name=${name:0:${1-28}}
    echo "${name%-}"
}

# program: sets $program, what every host runs: qlog.main with the flags, or another module where
# they begin with -m (-m qlog.commands.doctor --config=...).
program() {
    case ${flags[0]-} in
        -m)
            [ -n "${flags[1]-}" ] || fail "-m needs a module, such as qlog.commands.doctor"
            program=(python "${flags[@]}")
            ;;
        *) program=(python -m qlog.main --distributed=on ${flags[@]+"${flags[@]}"}) ;;
    esac
}

# outlives PREFIX: fails unless the workdir starts with PREFIX; other modules need none.
outlives() {
    [ "${flags[0]-}" = -m ] || workdir_of_flags "$1" >/dev/null
}

# host_environment PLATFORM: sets $environment, NAME=VALUE words for the hosts, from $assets and
# $compile_cache.
host_environment() {
    environment=("JAX_PLATFORMS=$1,cpu")
    if [ -n "${assets-}" ]; then environment+=("QLOG_ASSETS=$assets"); fi
    if [ -n "${compile_cache-}" ]; then
        environment+=("JAX_COMPILATION_CACHE_DIR=$compile_cache")
        echo "launch/${0##*/}: whoever may write to $compile_cache runs code on all hosts" >&2
    fi
}

# on_host: what every host runs, for launchers that want one line of shell.
on_host() {
    program
    quote env "${environment[@]}" launch/supervise --restarts=3 -- "${program[@]}"
}
