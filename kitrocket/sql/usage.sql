-- Every sum ends in ::bigint, so that it arrives as an int whatever it was summed from.
-- A window is since <= created_at < until; an until of NULL has no upper bound ('infinity' keeps it an index condition).
-- Each read stands here twice. The plain one takes the window from single rows, through usage_user_created_idx. The
-- one called _rolled takes whole UTC days from kitrocket.usage_daily and single rows for the edges of the window and for
-- days before the rollup is complete; in one statement, so in one snapshot. Its "edges" are:
--   first <= day < last      whole days, from the rollup
--   since <= t < first       single rows
--   last <= t < until        single rows
-- Without a whole day first and last are both until. It answers with raw_from too, before which an edge is not exact.

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
-- $1 user, $2 since, $3 until or NULL, $4 model or NULL for all.
WITH edges AS (
    SELECT raw_from,
           until,
           CASE WHEN first < last THEN first ELSE until END AS first,
           CASE WHEN first < last THEN last ELSE until END AS last
    FROM (
        SELECT coalesce(state.raw_from, '-infinity') AS raw_from,
               coalesce($3::timestamp, 'infinity') AS until,
               greatest(
                   ($2::timestamp + interval '1 day' - interval '1 microsecond')::date,
                   coalesce(state.rollup_from, 'infinity')
               ) AS first,
               coalesce($3::timestamp, 'infinity')::date AS last
        FROM (SELECT true) AS always
        LEFT JOIN kitrocket.usage_state AS state ON true
    ) AS whole
), calls AS (
    SELECT tokens
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= (SELECT first FROM edges)
      AND day < (SELECT last FROM edges)
      AND ($4::text IS NULL OR model = $4)
    UNION ALL
    SELECT tokens_used
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < (SELECT first FROM edges)
      AND ($4::text IS NULL OR model = $4)
    UNION ALL
    SELECT tokens_used
    FROM usage
    WHERE user_id = $1
      AND created_at >= (SELECT last FROM edges)
      AND created_at < (SELECT until FROM edges)
      AND ($4::text IS NULL OR model = $4)
)
SELECT coalesce(sum(tokens), 0)::bigint AS tokens, (SELECT raw_from FROM edges) AS raw_from
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
-- $1 user, $2 since, $3 until or NULL, $4 the buckets' beginnings: since, then UTC midnights, ascending.
WITH edges AS (
    SELECT raw_from,
           until,
           CASE WHEN first < last THEN first ELSE until END AS first,
           CASE WHEN first < last THEN last ELSE until END AS last
    FROM (
        SELECT coalesce(state.raw_from, '-infinity') AS raw_from,
               coalesce($3::timestamp, 'infinity') AS until,
               greatest(
                   ($2::timestamp + interval '1 day' - interval '1 microsecond')::date,
                   coalesce(state.rollup_from, 'infinity')
               ) AS first,
               coalesce($3::timestamp, 'infinity')::date AS last
        FROM (SELECT true) AS always
        LEFT JOIN kitrocket.usage_state AS state ON true
    ) AS whole
), calls AS (
    SELECT day::timestamp AS at, tokens, calls
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= (SELECT first FROM edges)
      AND day < (SELECT last FROM edges)
    UNION ALL
    SELECT created_at, tokens_used, 1
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < (SELECT first FROM edges)
    UNION ALL
    SELECT created_at, tokens_used, 1
    FROM usage
    WHERE user_id = $1
      AND created_at >= (SELECT last FROM edges)
      AND created_at < (SELECT until FROM edges)
)
SELECT edges.raw_from, sums.*
FROM edges
LEFT JOIN (
    SELECT width_bucket(at, $4::timestamp[]) AS bucket, sum(tokens)::bigint AS tokens, sum(calls)::bigint AS calls
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
-- $1 user, $2 since, $3 until or NULL.
WITH edges AS (
    SELECT raw_from,
           until,
           CASE WHEN first < last THEN first ELSE until END AS first,
           CASE WHEN first < last THEN last ELSE until END AS last
    FROM (
        SELECT coalesce(state.raw_from, '-infinity') AS raw_from,
               coalesce($3::timestamp, 'infinity') AS until,
               greatest(
                   ($2::timestamp + interval '1 day' - interval '1 microsecond')::date,
                   coalesce(state.rollup_from, 'infinity')
               ) AS first,
               coalesce($3::timestamp, 'infinity')::date AS last
        FROM (SELECT true) AS always
        LEFT JOIN kitrocket.usage_state AS state ON true
    ) AS whole
), calls AS (
    SELECT model, tokens, calls
    FROM kitrocket.usage_daily
    WHERE user_id = $1
      AND day >= (SELECT first FROM edges)
      AND day < (SELECT last FROM edges)
    UNION ALL
    SELECT model, tokens_used, 1
    FROM usage
    WHERE user_id = $1
      AND created_at >= $2::timestamp
      AND created_at < (SELECT first FROM edges)
    UNION ALL
    SELECT model, tokens_used, 1
    FROM usage
    WHERE user_id = $1
      AND created_at >= (SELECT last FROM edges)
      AND created_at < (SELECT until FROM edges)
)
SELECT edges.raw_from, sums.*
FROM edges
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
-- There is no user to look for, so this one reads much of both tables: its bounds are written out for the planner to see,
-- which then reads in parallel, and single rows by usage_created_at_brin: ids are named, as usage_user_created_idx has none
-- and would be searched for each user. The first single rows are those before the first midnight, then come days before
-- the rollup is complete, then what is behind the last midnight.
-- $1 since, $2 until or NULL, $3 how many.
WITH calls AS (
    SELECT user_id, tokens, calls
    FROM kitrocket.usage_daily
    WHERE day >= ($1::timestamp + interval '1 day' - interval '1 microsecond')::date
      AND day < coalesce($2::timestamp, 'infinity')::date
      AND day >= coalesce((SELECT rollup_from FROM kitrocket.usage_state), 'infinity')
    UNION ALL
    SELECT user_id, tokens_used::bigint, 1::bigint
    FROM usage
    WHERE created_at >= $1::timestamp
      AND created_at < least(
          ($1::timestamp + interval '1 day' - interval '1 microsecond')::date,
          coalesce($2::timestamp, 'infinity')
      )
      AND id >= ''
    UNION ALL
    SELECT user_id, tokens_used::bigint, 1::bigint
    FROM usage
    WHERE created_at >= ($1::timestamp + interval '1 day' - interval '1 microsecond')::date
      AND created_at < coalesce($2::timestamp, 'infinity')
      AND created_at < coalesce((SELECT rollup_from FROM kitrocket.usage_state), 'infinity')
      AND id >= ''
      AND coalesce((SELECT rollup_from FROM kitrocket.usage_state), 'infinity')
          > ($1::timestamp + interval '1 day' - interval '1 microsecond')::date
    UNION ALL
    SELECT user_id, tokens_used::bigint, 1::bigint
    FROM usage
    WHERE created_at >= greatest(
          coalesce($2::timestamp, 'infinity')::date,
          ($1::timestamp + interval '1 day' - interval '1 microsecond')::date
      )
      AND created_at < coalesce($2::timestamp, 'infinity')
      AND created_at >= coalesce((SELECT rollup_from FROM kitrocket.usage_state), 'infinity')
      AND id >= ''
)
SELECT coalesce(state.raw_from, '-infinity') AS raw_from, sums.*
FROM (SELECT true) AS always
LEFT JOIN kitrocket.usage_state AS state ON true
LEFT JOIN (
    SELECT user_id, sum(tokens)::bigint AS tokens, sum(calls)::bigint AS calls
    FROM calls
    GROUP BY user_id
    HAVING sum(calls) <> 0
    ORDER BY tokens DESC, user_id COLLATE "C"
    LIMIT $3::bigint
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
