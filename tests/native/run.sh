#!/bin/sh
# Build tests/native/tiers.cpp with the C++ core and run it: run.sh host|san|old|avx512|neon;
# the runtime, on files with faults: run.sh fuzz [SECONDS] [SEED].
# What a machine lacks (Debian: libsimde-dev; g++-aarch64-linux-gnu and qemu-user) is skipped by name.
set -eu
cd "$(dirname "$0")/../.."
core=src/subbyte/kernels/csrc
out=build/native
mkdir -p "$out"
sources="tests/native/tiers.cpp"
for file in "$core"/*.cpp; do
  [ "$file" = "$core/bindings.cpp" ] || sources="$sources $file"
done
flags="-std=c++17 -O2 -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -ffp-contract=off -I$core"
skip() {
  echo "skipped: $1"
  exit 0
}
case "$1" in
  host)
    ${CXX:-g++} $flags $sources -o "$out/host" -ldl
    "$out/host"
    ;;
  san)
    ${CXX:-g++} $flags -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
      $sources -o "$out/san" -ldl
    "$out/san"
    ;;
  avx512)
    [ -e /usr/include/simde/x86/avx512.h ] || skip "no SIMDe headers to emulate AVX-512 with"
    ${CXX:-g++} $flags -DSUBBYTE_EMULATE $sources -o "$out/avx512" -ldl
    "$out/avx512"
    ;;
  neon)
    command -v aarch64-linux-gnu-g++ > /dev/null || skip "no aarch64-linux-gnu-g++"
    command -v qemu-aarch64 > /dev/null || skip "no qemu-aarch64"
    aarch64-linux-gnu-g++ $flags $sources -static -o "$out/neon" -ldl 2> "$out/neon.log" || {
      cat "$out/neon.log"
      exit 1
    }
    qemu-aarch64 -cpu max "$out/neon"
    ;;
  fuzz)  # the reader and the runtime on damaged files, under sanitizers
    runtime="tests/native/fuzz.cpp"
    for file in "$core"/*.cpp native/runtime/*.cpp; do
      case "$file" in
        */bindings.cpp | */origin.cpp | */roofs.cpp | */main.cpp) ;;
        "$core"/threads.cpp) ;;  # the runtime has its own
        *) runtime="$runtime $file" ;;
      esac
    done
    mkdir -p "$out/objects"
    objects=""
    stale=""
    for file in $runtime; do  # one by one: what has not changed is not compiled again
      object="$out/objects/$(echo "$file" | tr / _).o"
      objects="$objects $object"
      [ "$object" -nt "$file" ] && [ -z "$(find native "$core" -name '*.[hi]*' -newer "$object")" ] &&
        continue
      stale="$stale -c $file -o $object"
    done
    # shellcheck disable=SC2086
    echo $stale | xargs -r -n 4 -P "$(getconf _NPROCESSORS_ONLN)" ${CXX:-g++} $flags -O1 -g \
      -fsanitize=address,undefined -fno-sanitize-recover=all -Inative/include -Inative/runtime
    ${CXX:-g++} -fsanitize=address,undefined $objects -o "$out/fuzz" -ldl -lpthread
    root=$PWD
    cd "$out"
    ./fuzz "$root/tests/native/corpus" "${2:-20}" "${3:-1}"
    ;;
  old)
    [ "$(uname -m)" = x86_64 ] || skip "this is no x86-64 machine"
    command -v qemu-x86_64 > /dev/null || skip "no qemu-x86_64"
    ${CXX:-g++} $flags $sources -o "$out/host" -ldl
    qemu-x86_64 -cpu Nehalem "$out/host" | tee "$out/old.log"
    ! grep -q avx "$out/old.log"
    qemu-x86_64 -cpu Haswell "$out/host" | tee "$out/old.log"
    grep -q avx2 "$out/old.log" && ! grep -q -e avx512 -e avxvnni "$out/old.log"
    ;;
  *)
    echo "run.sh $1: expected host, san, fuzz, old, avx512 or neon" >&2
    exit 2
    ;;
esac
