#!/bin/sh
# "exchange.sh ADDRESS PORT1 PORT2": prints the SHA-256 of what a HTTP server sends, then sends the same back to PORT2.
echo "=== sum"
wget -q -O - "http://$1:$2/" | sha256sum
echo "=== back"
wget -q -O - "http://$1:$2/" | nc "$1" "$3"
echo "=== exchanged"
