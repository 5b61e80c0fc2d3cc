#!/bin/sh
# Does the console's lines one by one; after each "=== done STATUS".
stty -echo
echo "=== ready"
while read -r line; do
  eval "$line"
  echo "=== done $?"
done
