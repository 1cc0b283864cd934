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

# job_name [LETTERS]: a name from the workdir's last part; gcluster takes 28 letters.
job_name() {
    local name
    name=$(basename "$(workdir_of_flags)" | tr 'A-Z_.,=' 'a-z----' | tr -cd 'a-z0-9-')
    name=${name:0:${1-28}}
    echo "${name%-}"
}

# on_host: what every host runs, for launchers that want one line of shell.
on_host() {
    quote launch/supervise -- python -m qlog.main --distributed=on "${flags[@]}"
}
