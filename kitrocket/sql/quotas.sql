-- Tokens set aside for calls that run now, so that racing calls never pass a limit together.
-- A reservation counts while expires_at > now: one that has expired is free, swept or not.
-- Locks have one order: the user, the user's row of usage_quotas, rows of usage, reservations.

-- name: lock
-- Take the user's lock until the transaction ends, whether or not the user ever had a quota; no row for an unknown user.
-- What waited for it is counted by the next statement, never by this one: its snapshot is older than the wait.
-- $1 user, $2 now.
INSERT INTO kitrocket.usage_quotas AS kept (user_id, touched_at)
SELECT id, $2::timestamp
FROM users
WHERE id = $1
FOR KEY SHARE
ON CONFLICT (user_id) DO UPDATE SET touched_at = excluded.touched_at
RETURNING user_id;

-- name: used
-- Sum a user's tokens from an instant on, and find the newest of these calls.
-- $1 user, $2 since.
SELECT coalesce(sum(tokens_used), 0)::bigint AS tokens, max(created_at) AS newest
FROM usage
WHERE user_id = $1
  AND created_at >= $2::timestamp
  AND created_at < 'infinity';

-- name: used_rolled
-- The same, with whole UTC days from the rollup; raw_from is the day before which the beginning is not exact.
-- $1 user, $2 since.
WITH edge AS (
    SELECT coalesce(state.raw_from, '-infinity') AS raw_from,
           greatest(
               ($2::timestamp + interval '1 day' - interval '1 microsecond')::date,
               coalesce(state.rollup_from, 'infinity')
           ) AS first
    FROM (SELECT true) AS always
    LEFT JOIN kitrocket.usage_state AS state ON true
)
SELECT (
           SELECT coalesce(sum(tokens), 0)
           FROM kitrocket.usage_daily
           WHERE user_id = $1
             AND day >= (SELECT first FROM edge)
             AND day < 'infinity'
       )::bigint
       + (
           SELECT coalesce(sum(tokens_used), 0)
           FROM usage
           WHERE user_id = $1
             AND created_at >= $2::timestamp
             AND created_at < (SELECT first FROM edge)
       )::bigint AS tokens,
       (
           SELECT max(created_at)
           FROM usage
           WHERE user_id = $1
             AND created_at >= $2::timestamp
             AND created_at < 'infinity'
       ) AS newest,
       edge.raw_from
FROM edge;

-- name: admit
-- Set tokens aside where they fit beside what others reserved; the same reservation again is admitted again, and its time
-- begins anew. It fits but is not admitted when its id is another one's. To be run under the lock.
-- $1 id, $2 user, $3 model, $4 tokens, $5 now, $6 when it expires, $7 what calls have left of the tightest limit,
-- $8 thresholds or NULL.
WITH held AS (
    SELECT coalesce(sum(tokens) FILTER (WHERE id <> $1), 0)::bigint AS others, coalesce(bool_or(id = $1), false) AS is_held
    FROM kitrocket.usage_reservations
    WHERE user_id = $2
      AND expires_at > $5::timestamp
), judged AS (
    SELECT others, is_held OR others + $4::integer <= $7::bigint AS fits
    FROM held
), admitted AS (
    INSERT INTO kitrocket.usage_reservations AS kept
        (id, user_id, model, tokens, used, created_at, expires_at, thresholds)
    SELECT $1, $2, $3, $4::integer, 0, $5::timestamp, $6::timestamp, $8::jsonb
    FROM judged
    WHERE fits
    ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at
        WHERE (kept.user_id, kept.model, kept.tokens) = (excluded.user_id, excluded.model, excluded.tokens)
    RETURNING true
)
SELECT others, fits, EXISTS (SELECT FROM admitted) AS admitted
FROM judged;

-- name: held
-- List what a user has reserved, in the order in which it expires.
-- $1 user, $2 now, $3 a reservation to leave out.
SELECT expires_at, tokens
FROM kitrocket.usage_reservations
WHERE user_id = $1
  AND expires_at > $2::timestamp
  AND id <> $3
ORDER BY expires_at;

-- name: leaves_at
-- Find the time of the call with which enough tokens have left a sliding window, and what the calls before it used: a call
-- leaves a window's length after its time. A reservation stands here at the time of a call that leaves when it expires.
-- Reads no further than that call, in the order of the index.
-- $1 user, $2 since, $3 times of reservations, $4 their tokens: arrays of one length, $5 how many tokens must leave.
WITH found AS (
    SELECT at
    FROM (
        SELECT created_at AS at, sum(tokens_used) OVER (ORDER BY created_at ROWS UNBOUNDED PRECEDING) AS gone
        FROM usage
        WHERE user_id = $1
          AND created_at >= $2::timestamp
          AND created_at < 'infinity'
    ) AS leaving
    WHERE gone + (
        SELECT coalesce(sum(held.tokens), 0)
        FROM unnest($3::timestamp[], $4::integer[]) AS held (at, tokens)
        WHERE held.at <= leaving.at
    ) >= $5::bigint
    ORDER BY at
    LIMIT 1
)
SELECT found.at,
       (
           SELECT coalesce(sum(tokens_used), 0)
           FROM usage
           WHERE user_id = $1
             AND created_at >= $2::timestamp
             AND created_at < found.at
       )::bigint AS before
FROM found;

-- name: reservation
-- Read a reservation, expired or not.
-- $1 id.
SELECT user_id, model, tokens, thresholds
FROM kitrocket.usage_reservations
WHERE id = $1;

-- name: forget
-- Delete the reservations whose calls are recorded in the same transaction.
-- $1 ids, an array.
DELETE FROM kitrocket.usage_reservations
WHERE id IN (
    SELECT id
    FROM kitrocket.usage_reservations
    WHERE id = ANY ($1::text[])
    ORDER BY id COLLATE "C"
    FOR UPDATE
);

-- name: renew
-- Give reservations of running calls more time, and note what they have used. One that has expired stays so, since others
-- may have its tokens by now; one that is being settled is left alone.
-- $1 now, $2 ids, $3 what they have used, $4 when they expire: arrays of one length.
WITH running AS (
    SELECT kept.id, new.used, new.expires_at
    FROM unnest($2::text[], $3::integer[], $4::timestamp[]) AS new (id, used, expires_at)
    JOIN kitrocket.usage_reservations AS kept ON kept.id = new.id
    WHERE kept.expires_at > $1::timestamp
    FOR NO KEY UPDATE OF kept SKIP LOCKED
)
UPDATE kitrocket.usage_reservations AS kept
SET used = running.used, expires_at = running.expires_at
FROM running
WHERE kept.id = running.id
RETURNING kept.id;

-- name: expired
-- Read expired reservations of calls that have used something, and keep their users from being deleted.
-- $1 now, $2 the most of them.
SELECT kept.id, kept.user_id, kept.model, kept.used, kept.expires_at
FROM kitrocket.usage_reservations AS kept
JOIN users ON users.id = kept.user_id
WHERE kept.expires_at <= $1::timestamp
  AND kept.used > 0
LIMIT $2::bigint
FOR KEY SHARE OF users;

-- name: sweep
-- Delete expired reservations of calls that have used nothing.
-- $1 the latest time at which they expired, $2 the most of them.
WITH gone AS (
    DELETE FROM kitrocket.usage_reservations
    WHERE id IN (
        SELECT id
        FROM kitrocket.usage_reservations
        WHERE expires_at <= $1::timestamp
          AND used = 0
        LIMIT $2::bigint
        FOR UPDATE SKIP LOCKED
    )
    RETURNING true
)
SELECT count(*) AS deleted
FROM gone;

-- name: alerts
-- List which of a user's thresholds were crossed, to be read before the calls are counted.
-- $1 user, $2 quotas, $3 beginnings of their periods: arrays of one length.
SELECT kept.quota, kept.percent, kept.period_start, kept.fired_at
FROM unnest($2::text[], $3::timestamp[]) AS asked (quota, period_start)
JOIN kitrocket.usage_alerts AS kept
    ON kept.user_id = $1 AND kept.quota = asked.quota AND kept.period_start = asked.period_start;

-- name: fire
-- Note that thresholds were crossed, and forget those of long gone periods; a row for each that nobody noted before.
-- $1 user, $2 quotas, $3 percentages, $4 beginnings of their periods: arrays of one length, $5 now.
WITH gone AS (
    DELETE FROM kitrocket.usage_alerts AS kept
    USING unnest($2::text[], $4::timestamp[]) AS crossed (quota, period_start)
    WHERE kept.user_id = $1
      AND kept.quota = crossed.quota
      AND isfinite(kept.period_start)
      AND kept.period_start < crossed.period_start - interval '100 days'
)
INSERT INTO kitrocket.usage_alerts (user_id, quota, percent, period_start, fired_at)
SELECT users.id, quota, percent, period_start, $5::timestamp
FROM unnest($2::text[], $3::integer[], $4::timestamp[]) AS crossed (quota, percent, period_start)
JOIN users ON users.id = $1
ORDER BY quota, percent
ON CONFLICT DO NOTHING
RETURNING quota, percent;

-- name: rearm
-- Let thresholds fire again, unless they did since they were read.
-- $1 user, $2 quotas, $3 percentages, $4 when they had fired: arrays of one length.
DELETE FROM kitrocket.usage_alerts AS kept
USING unnest($2::text[], $3::integer[], $4::timestamp[]) AS low (quota, percent, fired_at)
WHERE kept.user_id = $1
  AND kept.quota = low.quota
  AND kept.percent = low.percent
  AND kept.period_start = '-infinity'
  AND kept.fired_at = low.fired_at;
