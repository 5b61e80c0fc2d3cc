#!/bin/sh
# "measure-disk.sh DEVICE SECONDS JOB…", each job "NAME,RW,BS,DEPTH": fio does one after the other, between the lines
# "begin NAME" and "end NAME READ-KIB;RATE;IOPS;WRITTEN-KIB;RATE;IOPS" (fields 6 to 8 and 47 to 49 of fio's terse form).
device=$1 seconds=$2
shift 2
job() {
  fio --name=job --filename="$device" --direct=1 --ioengine=libaio --time_based --minimal "$@" > /tmp/fio || cat /tmp/fio
}
# The program is translated, and the disk in the host's memory, before anything counts.
job --rw=read --bs=1M --iodepth=8 --runtime=2
for each in "$@"; do
  name=${each%%,*} rest=${each#*,}
  rw=${rest%%,*} rest=${rest#*,}
  echo "begin $name"
  job --rw="$rw" --bs="${rest%,*}" --iodepth="${rest#*,}" --runtime="$seconds"
  echo "end $name $(cut -d';' -f6-8,47-49 /tmp/fio)"
done
