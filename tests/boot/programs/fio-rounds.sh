#!/bin/sh
# "fio-rounds.sh DEVICE FIRST": fio writes round after round until the VM ends. Round N writes each block of part N
# modulo 8 (1 MiB) once, in random order, with N and its place in all of it. "durable N;" says that all of it is there.
n=$2
while fio --name=round --filename="$1" --offset=$((n % 8))M --size=1M --rw=randwrite --bs=4k --direct=1 \
  --ioengine=libaio --iodepth=16 --fdatasync=16 --end_fsync=1 --randseed="$n" \
  --verify=pattern --verify_pattern="0x$(printf %08x "$n")%o" --do_verify=0 --output=/tmp/fio; do
  echo "durable $n;"
  n=$((n + 1))
done
echo "round $n failed"
cat /tmp/fio
