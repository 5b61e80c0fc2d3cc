CREATE TABLE item (id INTEGER PRIMARY KEY, owner INTEGER, name TEXT, price INTEGER);
CREATE TABLE owner (id INTEGER PRIMARY KEY, name TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
INSERT INTO owner SELECT i, 'owner ' || i FROM n;
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
INSERT INTO item SELECT i, i * 7919 % 200 + 1, 'item ' || (i * 31 % 40009), i * i % 10007 FROM n;
COMMIT;
CREATE INDEX item_by_name ON item (name);
CREATE INDEX item_by_owner ON item (owner, price);
UPDATE item SET price = price + 1 WHERE owner % 3 = 0;
DELETE FROM item WHERE name LIKE '%99';
SELECT count(*), sum(price) FROM item;
SELECT o.name, count(*), sum(i.price) FROM item i JOIN owner o ON o.id = i.owner
GROUP BY o.id ORDER BY sum(i.price) DESC, o.id LIMIT 2;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 8000)
SELECT sum(price) FROM n JOIN item ON item.name = 'item ' || (n.i * 13 % 40009);
