-- What `kitrocket doctor` looks for in the rows.

-- name: odd_addresses
-- A page of the users whose e-mail address has a character beyond lower-case ASCII, the only ones that may not be in
-- the form that is stored.
-- $1 the last id of the page before, '' at first
SELECT u.id, u.email, lower(u.email) AS lowered
  FROM users u
 WHERE u.id > $1 AND (u.email COLLATE "C") ~ '[^!-@[-~]'
 ORDER BY u.id
 LIMIT 1000;

-- name: same_addresses
-- Users that have one address once it is in the form that is stored: odd ones, and whoever has it in that form already.
-- $1 ids of users with an odd address, $2 their addresses in that form
WITH odd AS (
    SELECT o.id, o.email FROM unnest($1::text[], $2::text[]) AS o(id, email)
), everyone AS (
    SELECT id, email FROM odd
    UNION
    SELECT u.id, u.email FROM users u WHERE u.email IN (SELECT email FROM odd)
)
SELECT array_agg(id ORDER BY id) AS ids FROM everyone GROUP BY email HAVING count(DISTINCT id) > 1 ORDER BY 1;

-- name: usage_triggers
-- The triggers on usage, and whether each fires: 'O' when it does.
SELECT tgname::text AS name, tgenabled::text AS enabled
  FROM pg_trigger
 WHERE tgrelid = 'public.usage'::regclass AND NOT tgisinternal;

-- name: usage_is_vacuumed_late
-- Whether usage is large, and waits for more than 2 % of new rows until it is vacuumed, without which index-only scans
-- look at the table too.
SELECT c.reltuples >= 100000
       AND coalesce(
           (SELECT option_value::numeric
              FROM pg_options_to_table(c.reloptions)
             WHERE option_name = 'autovacuum_vacuum_insert_scale_factor'),
           current_setting('autovacuum_vacuum_insert_scale_factor')::numeric
       ) > 0.02
  FROM pg_class c
 WHERE c.oid = 'public.usage'::regclass;

-- name: any_plain_oauth_token
-- Whether an OAuth token is stored as the provider issued it.
SELECT EXISTS (SELECT FROM accounts a WHERE a.access_token NOT LIKE 'f1$%' OR a.refresh_token NOT LIKE 'f1$%');
