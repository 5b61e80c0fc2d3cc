import collections
import heapq
import json
import re

TEXT = "the quick brown fox jumps over the lazy dog while seventy two bytes sleep in a page of memory"


class Account:
    def __init__(self, number):
        self.number, self.balance = number, 0

    def move(self, amount, other):
        self.balance -= amount
        other.balance += amount


def words(rounds):
    counts = collections.Counter()
    for n in range(rounds):
        for word in TEXT.split():
            counts[word[n % len(word):] + word[:n % len(word)]] += n
    return sum(v * len(k) for k, v in counts.items())


def accounts(rounds):
    all = [Account(n) for n in range(97)]
    for n in range(rounds):
        all[n % 97].move(n * n % 1000, all[n * 31 % 97])
    return sum(a.number * a.balance for a in all)


def records(rounds):
    data = [{"id": n, "name": "x%d" % n, "tags": [n % 3, n % 5]} for n in range(rounds)]
    back = json.loads(json.dumps(data))
    heap = [(-(r["id"] * 7919 % 10007), r["name"]) for r in back if r["tags"] != [0, 0]]
    heapq.heapify(heap)
    return sum(-heapq.heappop(heap)[0] for _ in range(rounds // 4))


def digits(rounds):
    found = re.findall(r"(\d)(?=\1)|([13579]{2})", str(3 ** rounds))
    return len(found)


def primes(limit):
    sieve = bytearray(b"\1") * limit
    for n in range(2, int(limit ** 0.5) + 1):
        if sieve[n]:
            sieve[n * n::n] = bytes(len(range(n * n, limit, n)))
    return sum(n for n in range(2, limit) if sieve[n])


print(words(1500), accounts(60000), records(6000), digits(9000), primes(200000))
