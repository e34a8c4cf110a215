-- How kitrocket.usage_daily is filled, compared with single calls, repaired, and outlived by pruning.
-- Triggers on usage keep it exact at every commit. Its rows are locked in the order of their key, here as there.
-- Days are dates and times are timestamps: a time bound as a date would lose its hours.

-- name: state
-- Read from which day on the rollup is complete, and from which day on single calls are kept.
SELECT rollup_from, raw_from
FROM kitrocket.usage_state;

-- name: floor_held
-- Read from which day on single calls are kept, and keep it from moving until the transaction ends.
SELECT raw_from
FROM kitrocket.usage_state
FOR SHARE;

-- name: days
-- List the days that have calls or rows in the rollup, the newest first.
-- $1 the first day.
SELECT created_at::date AS day
FROM usage
WHERE isfinite(created_at)
  AND created_at >= $1::date
UNION
SELECT day
FROM kitrocket.usage_daily
WHERE isfinite(day)
  AND day >= $1::date
ORDER BY day DESC;

-- name: missing_keys
-- List the users and models that have calls on a day and no row in the rollup, in the order in which rows are locked.
-- $1 the day.
SELECT DISTINCT user_id, model
FROM usage
WHERE created_at >= $1::date
  AND created_at < $1::date + 1
  AND NOT EXISTS (
      SELECT FROM kitrocket.usage_daily AS kept
      WHERE kept.user_id = usage.user_id AND kept.day = $1::date AND kept.model = usage.model
  )
ORDER BY user_id, model;

-- name: add_keys
-- Insert rows of zeros into the rollup, as step one of recomputing a day; commit before step two. Users who were deleted
-- meanwhile are left out.
-- $1 the day, $2 user ids, $3 models: arrays of one length.
WITH living AS (
    SELECT id
    FROM users
    WHERE id = ANY ($2::text[])
    ORDER BY id
    FOR KEY SHARE
)
INSERT INTO kitrocket.usage_daily (user_id, day, model, tokens, calls)
SELECT user_id, $1::date, model, 0, 0
FROM unnest($2::text[], $3::text[]) AS missing (user_id, model)
JOIN living ON living.id = missing.user_id
ORDER BY user_id, model
ON CONFLICT DO NOTHING;

-- name: keys
-- List the keys of a day in the order in which they are locked.
-- $1 the day.
SELECT user_id, model
FROM kitrocket.usage_daily
WHERE day = $1::date
ORDER BY user_id, model;

-- name: lock_keys
-- Lock keys of a day, in order: step two. Who wrote such a call before has committed, who writes one later waits.
-- $1 the day, $2 user ids, $3 models: arrays of one length.
SELECT true
FROM unnest($2::text[], $3::text[]) AS wanted (user_id, model)
JOIN kitrocket.usage_daily AS kept
    ON kept.user_id = wanted.user_id AND kept.day = $1::date AND kept.model = wanted.model
ORDER BY kept.user_id, kept.day, kept.model
FOR NO KEY UPDATE OF kept;

-- name: recompute_keys
-- Set the locked keys of a day to what the calls say: step three. It is a statement of its own because the snapshot of
-- the one that waited for the locks misses what was committed meanwhile. Answers a row for each key that was wrong.
-- $1 the day, $2 user ids, $3 models: arrays of one length.
UPDATE kitrocket.usage_daily AS kept
SET tokens = counted.tokens, calls = counted.calls
FROM unnest($2::text[], $3::text[]) AS wanted (user_id, model)
CROSS JOIN LATERAL (
    SELECT coalesce(sum(usage.tokens_used), 0)::bigint AS tokens, count(*) AS calls
    FROM usage
    WHERE usage.user_id = wanted.user_id
      AND usage.model = wanted.model
      AND usage.created_at >= $1::date
      AND usage.created_at < $1::date + 1
) AS counted
WHERE kept.user_id = wanted.user_id
  AND kept.day = $1::date
  AND kept.model = wanted.model
  AND (kept.tokens, kept.calls) IS DISTINCT FROM (counted.tokens, counted.calls)
RETURNING true;

-- name: complete_from
-- Say that the rollup is complete from a day on, if it was from a later one.
-- $1 the day, NULL for all days.
UPDATE kitrocket.usage_state
SET rollup_from = coalesce($1::date, '-infinity')
WHERE rollup_from > coalesce($1::date, '-infinity');

-- name: verify
-- Compare the rollup with single calls, where it is complete and they are kept, in one snapshot: how many days, how many
-- keys differ, and some of these, the newest first.
-- $1 how many of them.
WITH compared AS (
    SELECT user_id, day, model,
           coalesce(counted.tokens, 0) AS tokens, coalesce(counted.calls, 0) AS calls,
           coalesce(kept.tokens, 0) AS kept_tokens, coalesce(kept.calls, 0) AS kept_calls
    FROM (
        SELECT user_id, created_at::date AS day, model, sum(tokens_used)::bigint AS tokens, count(*) AS calls
        FROM usage
        WHERE isfinite(created_at)
          AND created_at >= (SELECT greatest(rollup_from, raw_from) FROM kitrocket.usage_state)
        GROUP BY user_id, created_at::date, model
    ) AS counted
    FULL JOIN (
        SELECT user_id, day, model, tokens, calls
        FROM kitrocket.usage_daily
        WHERE isfinite(day)
          AND day >= (SELECT greatest(rollup_from, raw_from) FROM kitrocket.usage_state)
    ) AS kept USING (user_id, day, model)
), wrong AS (
    SELECT *
    FROM compared
    WHERE (tokens, calls) IS DISTINCT FROM (kept_tokens, kept_calls)
)
SELECT (SELECT count(DISTINCT day) FROM compared WHERE calls > 0 OR kept_calls <> 0) AS days,
       (SELECT count(*) FROM wrong) AS drift,
       example.*
FROM (SELECT true) AS always
LEFT JOIN (
    SELECT * FROM wrong ORDER BY day DESC, user_id, model LIMIT $1::bigint
) AS example ON true;

-- name: raise_floor
-- Move the day from which on single calls are kept, never back; no row when the rollup is not complete.
-- $1 the day.
UPDATE kitrocket.usage_state
SET raw_from = greatest(raw_from, $1::date)
WHERE rollup_from = '-infinity'
RETURNING raw_from;

-- name: days_before
-- List the days before another one that have rows in the rollup, the oldest first.
-- $1 the day.
SELECT DISTINCT day
FROM kitrocket.usage_daily
WHERE isfinite(day)
  AND day < $1::date
ORDER BY day;

-- name: count_before
-- Count the single calls of the days before another one, but those that are still to be sent to the provider.
-- $1 the day.
SELECT count(*) AS calls
FROM usage
WHERE isfinite(created_at)
  AND created_at < $1::date
  AND NOT EXISTS (SELECT FROM kitrocket.usage_outbox AS outbox WHERE outbox.usage_id = usage.id);

-- name: begin_pruning
-- Keep the trigger from subtracting what this transaction deletes, and this transaction from waiting long.
SELECT set_config('kitrocket.pruning', 'on', true), set_config('lock_timeout', '1s', true);

-- name: prune
-- Delete calls of a day that the rollup keeps summed, but not what is still to be sent to the provider.
-- $1 the day, $2 the most of them.
WITH gone AS (
    DELETE FROM usage
    WHERE ctid = ANY (ARRAY(
        SELECT ctid
        FROM usage
        WHERE created_at >= $1::date
          AND created_at < $1::date + 1
          AND NOT EXISTS (SELECT FROM kitrocket.usage_outbox AS outbox WHERE outbox.usage_id = usage.id)
        LIMIT $2::bigint
        FOR UPDATE OF usage SKIP LOCKED
    ))
    RETURNING true
)
SELECT count(*) AS deleted
FROM gone;
