-- Every sum ends in ::bigint, so that it arrives as an int whatever it was summed from.
-- A window is since <= created_at < until; an until of NULL has no upper bound ('infinity' keeps it an index condition).
-- Each read stands here twice. The plain one takes the window from single rows, through usage_user_created_idx. The
-- one called _rolled takes whole UTC days from kitrocket.usage_daily and single rows for the edges of the window; in one
-- statement, so in one snapshot:
--   first <= day < last                  added, from the rollup
--   between since and first single rows  added when since comes first, else subtracted, since the days reach too far
--   between last and until  single rows  added when last comes first, else subtracted
-- "first" and "last" are midnights, or both until where no day is read whole; an infinite one is NULL. Whoever asks
-- chooses them (kitrocket.windows.whole_days), so that PostgreSQL plans with them, and judges them by the state of the
-- same snapshot: days before rollup_from are not complete, and before raw_from an end that is no midnight is not exact.

-- name: insert
-- Record a batch; a row whose id is there already is left out, and so is its id from the answer.
-- $1 ids, $2 user ids, $3 tokens, $4 models, $5 instants: arrays of one length.
-- Without a conflict target: the key is (id) on one node and (user_id, id) on Citus. Ascending ids, in the order that
-- Python sorts by, keep two batches from waiting for each other.
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
SELECT id, user_id, tokens_used, model, created_at
FROM unnest($1::text[], $2::text[], $3::integer[], $4::text[], $5::timestamp[])
    AS new (id, user_id, tokens_used, model, created_at)
ORDER BY id COLLATE "C"
ON CONFLICT DO NOTHING
RETURNING id;

-- name: insert_new
-- Record a batch of calls whose ids were made for it: all of them, or none where an id is there already.
-- $1 ids, ascending, $2 user ids, $3 tokens, $4 models, $5 instants: arrays of one length.
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::integer[]), unnest($4::text[]), unnest($5::timestamp[]);

-- name: insert_new_one
-- The same for a batch of one, for less than the statement for many costs.
-- $1 id, $2 user id, $3 tokens, $4 model, $5 instant.
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
VALUES ($1, $2, $3, $4, $5);

-- name: insert_one
-- Record a batch of one, for less than the statement for many costs.
-- $1 id, $2 user id, $3 tokens, $4 model, $5 instant.
INSERT INTO usage (id, user_id, tokens_used, model, created_at)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT DO NOTHING
RETURNING id;

-- name: recorded
-- Read the rows that an insert found there already. It is a statement of its own because the insert's snapshot
-- misses a row that was committed while the insert waited for it.
-- $1 ids, an array.
SELECT id, user_id, tokens_used, model, created_at
FROM usage
WHERE id = ANY ($1::text[]);

-- name: announce
-- Tell who listens that usage was recorded; in a transaction, once it is committed.
-- $1 the channel, $2 the users' ids as JSON, or * for all.
SELECT pg_notify($1, $2);

-- name: total
-- Sum a user's tokens in a window.
-- $1 user, $2 since, $3 until or NULL, $4 model or NULL for all.
WITH calls AS (
    SELECT tokens_used AS tokens
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < coalesce($3::timestamp, 'infinity')
      AND ($4::text IS NULL OR model = $4)
)
SELECT coalesce(sum(tokens), 0)::bigint AS tokens
FROM calls;

-- name: total_rolled
-- Sum a user's tokens in a window.
-- $1 user, $2 since, $3 until or NULL, $4 first, $5 last, $6 model or NULL for all.
WITH calls AS (
    SELECT tokens
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= $4::timestamp::date
      AND day < coalesce($5::timestamp, 'infinity')::date
      AND ($6::text IS NULL OR model = $6)
    UNION ALL
    SELECT tokens_used * CASE WHEN $4 < $2::timestamp THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($2::timestamp, $4)
      AND created_at < greatest($2::timestamp, coalesce($4, 'infinity'))
      AND ($6::text IS NULL OR model = $6)
    UNION ALL
    SELECT tokens_used * CASE WHEN $3::timestamp < $5 THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($3::timestamp, $5)
      AND created_at < greatest($3::timestamp, $5)
      AND ($6::text IS NULL OR model = $6)
)
SELECT coalesce((SELECT rollup_from FROM kitrocket.usage_state), 'infinity') AS rollup_from,
       coalesce((SELECT raw_from FROM kitrocket.usage_state), '-infinity') AS raw_from,
       coalesce(sum(tokens), 0)::bigint AS tokens
FROM calls;

-- name: by_time
-- Sum a user's tokens and count the calls by bucket, numbered from 1; a bucket without a call has no row.
-- $1 user, $2 since, $3 until or NULL, $4 the buckets' beginnings, ascending, the first of them since.
WITH calls AS (
    SELECT created_at, tokens_used AS tokens
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < coalesce($3::timestamp, 'infinity')
)
SELECT width_bucket(created_at, $4::timestamp[]) AS bucket, sum(tokens)::bigint AS tokens, count(*) AS calls
FROM calls
GROUP BY bucket
ORDER BY bucket;

-- name: by_time_rolled
-- Sum a user's tokens and count the calls by bucket, numbered from 1. At least one row; without a call it is empty.
-- What a first day before since has too much stands at since, as what is subtracted from it does.
-- $1 user, $2 since, $3 until or NULL, $4 first, $5 last,
-- $6 the buckets' beginnings: since, then UTC midnights, ascending.
WITH calls AS (
    SELECT greatest(day::timestamp, $2::timestamp) AS at, tokens, calls
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= $4::timestamp::date
      AND day < coalesce($5::timestamp, 'infinity')::date
    UNION ALL
    SELECT greatest(created_at, $2),
           tokens_used * CASE WHEN $4 < $2::timestamp THEN -1 ELSE 1 END::bigint,
           CASE WHEN $4 < $2::timestamp THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($2::timestamp, $4)
      AND created_at < greatest($2::timestamp, coalesce($4, 'infinity'))
    UNION ALL
    SELECT greatest(created_at, $2),
           tokens_used * CASE WHEN $3::timestamp < $5 THEN -1 ELSE 1 END::bigint,
           CASE WHEN $3::timestamp < $5 THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($3::timestamp, $5)
      AND created_at < greatest($3::timestamp, $5)
)
SELECT coalesce(state.rollup_from, 'infinity') AS rollup_from,
       coalesce(state.raw_from, '-infinity') AS raw_from,
       sums.*
FROM (SELECT true) AS always
LEFT JOIN kitrocket.usage_state AS state ON true
LEFT JOIN (
    SELECT width_bucket(at, $6::timestamp[]) AS bucket, sum(tokens)::bigint AS tokens, sum(calls)::bigint AS calls
    FROM calls
    GROUP BY bucket
    HAVING sum(calls) <> 0
) AS sums ON true
ORDER BY bucket;

-- name: by_model
-- Sum a user's tokens and count the calls by model, the largest sum first.
-- $1 user, $2 since, $3 until or NULL.
WITH calls AS (
    SELECT model, tokens_used AS tokens
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < coalesce($3::timestamp, 'infinity')
)
SELECT model, sum(tokens)::bigint AS tokens, count(*) AS calls
FROM calls
GROUP BY model
ORDER BY tokens DESC, model COLLATE "C";

-- name: by_model_rolled
-- Sum a user's tokens and count the calls by model, the largest sum first. At least one row; without a call it is empty.
-- $1 user, $2 since, $3 until or NULL, $4 first, $5 last.
WITH calls AS (
    SELECT model, tokens, calls
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= $4::timestamp::date
      AND day < coalesce($5::timestamp, 'infinity')::date
    UNION ALL
    SELECT model,
           tokens_used * CASE WHEN $4 < $2::timestamp THEN -1 ELSE 1 END::bigint,
           CASE WHEN $4 < $2::timestamp THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($2::timestamp, $4)
      AND created_at < greatest($2::timestamp, coalesce($4, 'infinity'))
    UNION ALL
    SELECT model,
           tokens_used * CASE WHEN $3::timestamp < $5 THEN -1 ELSE 1 END::bigint,
           CASE WHEN $3::timestamp < $5 THEN -1 ELSE 1 END::bigint
    FROM usage
    WHERE user_id = $1
      AND created_at >= least($3::timestamp, $5)
      AND created_at < greatest($3::timestamp, $5)
)
SELECT coalesce(state.rollup_from, 'infinity') AS rollup_from,
       coalesce(state.raw_from, '-infinity') AS raw_from,
       sums.*
FROM (SELECT true) AS always
LEFT JOIN kitrocket.usage_state AS state ON true
LEFT JOIN (
    SELECT model, sum(tokens)::bigint AS tokens, sum(calls)::bigint AS calls
    FROM calls
    GROUP BY model
    HAVING sum(calls) <> 0
) AS sums ON true
ORDER BY tokens DESC, model COLLATE "C";

-- name: top_users
-- List the users with the largest sums in a window.
-- $1 since, $2 until or NULL, $3 how many.
WITH calls AS (
    SELECT user_id, tokens_used AS tokens
    FROM usage
    WHERE created_at >= $1::timestamp
      AND created_at < coalesce($2::timestamp, 'infinity')
)
SELECT user_id, sum(tokens)::bigint AS tokens, count(*) AS calls
FROM calls
GROUP BY user_id
ORDER BY tokens DESC, user_id COLLATE "C"
LIMIT $3::bigint;

-- name: top_users_rolled
-- List the users with the largest sums in a window. At least one row; without a call it is empty.
-- There is no user to look for, so this one reads much of both tables, in parallel, and single rows by
-- usage_created_at_brin: ids are named, as usage_user_created_idx has none and would be searched for each user. Each edge
-- stands here twice, added and subtracted. The planner drops those that are empty when it knows the bounds; a plan for
-- all bounds pays for four, looks dear beside it, and is never taken.
-- $1 since, $2 until or NULL, $3 first, $4 last, $5 how many.
WITH calls AS (
    SELECT user_id, tokens, calls
    FROM kitrocket.usage_daily
    WHERE day >= $3::timestamp::date
      AND day < coalesce($4::timestamp, 'infinity')::date
    UNION ALL
    SELECT user_id, tokens_used::bigint, 1::bigint
    FROM usage
    WHERE $1::timestamp < coalesce($3, 'infinity')
      AND created_at >= $1
      AND created_at < coalesce($3, 'infinity')
      AND id >= ''
    UNION ALL
    SELECT user_id, -tokens_used::bigint, -1::bigint
    FROM usage
    WHERE $3 < $1
      AND created_at >= $3
      AND created_at < $1
      AND id >= ''
    UNION ALL
    SELECT user_id, tokens_used::bigint, 1::bigint
    FROM usage
    WHERE $4 < $2::timestamp
      AND created_at >= $4
      AND created_at < $2
      AND id >= ''
    UNION ALL
    SELECT user_id, -tokens_used::bigint, -1::bigint
    FROM usage
    WHERE $2 < $4
      AND created_at >= $2
      AND created_at < $4
      AND id >= ''
)
SELECT coalesce(state.rollup_from, 'infinity') AS rollup_from,
       coalesce(state.raw_from, '-infinity') AS raw_from,
       sums.*
FROM (SELECT true) AS always
LEFT JOIN kitrocket.usage_state AS state ON true
LEFT JOIN (
    SELECT user_id, sum(tokens)::bigint AS tokens, sum(calls)::bigint AS calls
    FROM calls
    GROUP BY user_id
    HAVING sum(calls) <> 0
    ORDER BY tokens DESC, user_id COLLATE "C"
    LIMIT $5::bigint
) AS sums ON true
ORDER BY tokens DESC, user_id COLLATE "C";

-- name: billing_period
-- Find the period for which a user is billed: that of the newest live snapshot, else the month before the end of the live
-- row (a month before 31 March is the end of February).
-- $1 user.
SELECT since, until, source
FROM (
    SELECT previous_billing_date AS since, next_billing_date AS until, 'provider' AS source, event_at AS newest
    FROM kitrocket.dodo_subscriptions
    WHERE user_id = $1
      AND status = 'active'
      AND revoked_at IS NULL
      AND previous_billing_date < next_billing_date
    UNION ALL
    SELECT current_period_end - interval '1 month', current_period_end, 'row', updated_at
    FROM subscriptions
    WHERE user_id = $1
      AND status IN ('active', 'trialing', 'past_due')
      AND isfinite(current_period_end)
) AS periods
ORDER BY source, newest DESC
LIMIT 1;
