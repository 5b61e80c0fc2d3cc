#!/bin/sh
# "bridged.sh OWN PEER PORT1 PORT2": what a guest's interface on a bridge can do, with iperf3 and exchange.sh.
ip link set eth0 up
ip addr add "$1/24" dev eth0
echo "=== facts"
cat /sys/class/net/eth0/address /sys/class/net/eth0/device/features
ls /sys/class/net/eth0/queues | wc -l
taskset 1 sh /tests/exchange.sh "$2" "$3" "$4"
echo "=== up"
taskset 2 iperf3 --client "$2" --time 2
echo "=== down"
taskset 2 iperf3 --client "$2" --time 2 --reverse
echo "=== counters"
for n in tx_packets tx_bytes rx_packets rx_bytes; do cat "/sys/class/net/eth0/statistics/$n"; done
echo "=== interrupts"
grep virtio0- /proc/interrupts
echo "=== end"
