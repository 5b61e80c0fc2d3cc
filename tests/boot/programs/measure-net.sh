#!/bin/sh
# "measure-net.sh ADDRESS SECONDS PORT": iperf3 to ADDRESS, or by DHCP to the router when that is "router", between
# the lines "begin NAME" and "end NAME MBIT/S".
ip link set eth0 up
if [ "$1" = router ]; then
  cat > /tmp/lease <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/24" dev eth0
ip route add "$router" dev eth0
ip route add default via "$router"
echo "$router" > /tmp/router
END
  chmod +x /tmp/lease
  udhcpc -i eth0 -n -q -s /tmp/lease > /dev/null 2>&1
  peer=$(cat /tmp/router)
else
  ip addr add "${1%.*}.2/24" dev eth0
  peer=$1
fi
measure() {
  name=$1
  shift
  echo "begin $name"
  echo "end $name $(iperf3 --client "$peer" --format m "$@" | tee /tmp/iperf | awk '/receiver/ { print $7 }')"
  grep error /tmp/iperf
}
iperf3 --client "$peer" --port "$3" --time 1 > /dev/null
measure up --port "$3" --time "$2"
measure down --port "$3" --time "$2" --reverse
