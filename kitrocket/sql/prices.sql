-- What models cost. A price holds from the UTC midnight of its valid_from until that of the next one of its model and
-- currency; so a day of kitrocket.usage_daily has one price, and so has a single row.

-- name: set_prices
-- Set prices, and answer for each that was not so already whether it is new. In the order of the key, so that two
-- writers don't deadlock.
-- $1 models, $2 currencies, $3 days, $4 prices of a million tokens: arrays of one length, no key twice.
INSERT INTO kitrocket.model_prices AS kept (model, currency, valid_from, per_million)
SELECT model, currency, valid_from, per_million
FROM unnest($1::text[], $2::text[], $3::date[], $4::numeric[]) AS new (model, currency, valid_from, per_million)
ORDER BY model COLLATE "C", currency COLLATE "C", valid_from
ON CONFLICT (model, currency, valid_from) DO UPDATE
SET per_million = excluded.per_million
WHERE kept.per_million <> excluded.per_million
RETURNING xmax = 0 AS is_new;

-- name: prices
-- List the prices.
-- $1 model or NULL for all, $2 currency or NULL for all.
SELECT model, currency, valid_from, trim_scale(per_million) AS per_million
FROM kitrocket.model_prices
WHERE ($1::text IS NULL OR model = $1)
  AND ($2::text IS NULL OR currency = $2)
ORDER BY model COLLATE "C", currency COLLATE "C", valid_from;

-- name: remove_price
-- Remove one price.
-- $1 model, $2 currency, $3 valid_from.
DELETE FROM kitrocket.model_prices
WHERE model = $1
  AND currency = $2
  AND valid_from = $3
RETURNING model;

-- name: cost
-- Price the calls of a window, from single rows alone. Rows with is_line are what is asked for; then comes a row for
-- each model that was used on days without a price. "unpriced" are tokens without a price; what they cost is in no sum.
-- $1 user or NULL for all, $2 since, $3 until or NULL, $4 currency, $5 divide by user, $6 divide by model,
-- $7 the buckets' beginnings, ascending, the first of them since, $8 the most lines.
-- Tokens are summed for each price before they are multiplied. A millionth as a factor keeps every digit; a division
-- would not.
WITH prices AS (
    SELECT model,
           per_million,
           valid_from,
           lead(valid_from, 1, 'infinity') OVER (PARTITION BY model ORDER BY valid_from) AS valid_until
    FROM kitrocket.model_prices
    WHERE currency = $4
), calls AS (
    SELECT user_id, model, created_at AS at, tokens_used AS tokens
    FROM usage
    WHERE ($1::text IS NULL OR user_id = $1)
      AND created_at >= $2::timestamp
      AND created_at < coalesce($3::timestamp, 'infinity')
), sums AS (
    SELECT width_bucket(calls.at, $7::timestamp[]) AS bucket,
           CASE WHEN $5::boolean THEN calls.user_id END AS user_id,
           calls.model,
           prices.per_million,
           sum(calls.tokens) AS tokens,
           count(*) AS calls
    FROM calls
    LEFT JOIN prices
        ON prices.model = calls.model AND calls.at >= prices.valid_from AND calls.at < prices.valid_until
    GROUP BY 1, 2, 3, 4
), lines AS (
    SELECT true AS is_line,
           bucket,
           user_id,
           CASE WHEN $6::boolean THEN model END AS model,
           sum(tokens)::bigint AS tokens,
           sum(calls)::bigint AS calls,
           coalesce(sum(tokens) FILTER (WHERE per_million IS NULL), 0)::bigint AS unpriced,
           trim_scale(coalesce(sum(tokens * per_million * 0.000001), 0)) AS cost
    FROM sums
    GROUP BY 2, 3, 4
    LIMIT $8::bigint
)
SELECT *
FROM (
    SELECT *
    FROM lines
    UNION ALL
    SELECT false, NULL, NULL, model, sum(tokens)::bigint, sum(calls)::bigint, sum(tokens)::bigint, NULL
    FROM sums
    WHERE per_million IS NULL
    GROUP BY model
) AS found
ORDER BY is_line DESC, bucket, cost DESC, tokens DESC, model COLLATE "C", user_id COLLATE "C";

-- name: cost_rolled
-- The same, days first <= day < last from kitrocket.usage_daily, single rows for since <= t < first and last <= t < until,
-- summed by day before prices are looked up. Without a whole day first and last are both until. At least one row; without
-- a call it is empty.
-- $1 user or NULL for all, $2 since, $3 until or NULL, $4 currency, $5 divide by user, $6 divide by model,
-- $7 the buckets' beginnings: since, then UTC midnights, ascending, $8 the most lines.
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
), prices AS (
    SELECT model,
           per_million,
           valid_from,
           lead(valid_from, 1, 'infinity') OVER (PARTITION BY model ORDER BY valid_from) AS valid_until
    FROM kitrocket.model_prices
    WHERE currency = $4
), calls AS (
    SELECT user_id, model, day::timestamp AS at, tokens, calls
    FROM kitrocket.usage_daily
    WHERE ($1::text IS NULL OR user_id = $1)
      AND day >= (SELECT first FROM edges)
      AND day < (SELECT last FROM edges)
    UNION ALL
    SELECT user_id, model, min(created_at), sum(tokens_used), count(*)
    FROM usage
    WHERE ($1::text IS NULL OR user_id = $1)
      AND created_at >= $2::timestamp
      AND created_at < (SELECT first FROM edges)
    GROUP BY user_id, model, created_at::date
    UNION ALL
    SELECT user_id, model, min(created_at), sum(tokens_used), count(*)
    FROM usage
    WHERE ($1::text IS NULL OR user_id = $1)
      AND created_at >= (SELECT last FROM edges)
      AND created_at < (SELECT until FROM edges)
    GROUP BY user_id, model, created_at::date
), sums AS (
    SELECT width_bucket(calls.at, $7::timestamp[]) AS bucket,
           CASE WHEN $5::boolean THEN calls.user_id END AS user_id,
           calls.model,
           prices.per_million,
           sum(calls.tokens) AS tokens,
           sum(calls.calls) AS calls
    FROM calls
    LEFT JOIN prices
        ON prices.model = calls.model AND calls.at >= prices.valid_from AND calls.at < prices.valid_until
    GROUP BY 1, 2, 3, 4
    HAVING sum(calls.calls) <> 0
), lines AS (
    SELECT true AS is_line,
           bucket,
           user_id,
           CASE WHEN $6::boolean THEN model END AS model,
           sum(tokens)::bigint AS tokens,
           sum(calls)::bigint AS calls,
           coalesce(sum(tokens) FILTER (WHERE per_million IS NULL), 0)::bigint AS unpriced,
           trim_scale(coalesce(sum(tokens * per_million * 0.000001), 0)) AS cost
    FROM sums
    GROUP BY 2, 3, 4
    LIMIT $8::bigint
)
SELECT edges.raw_from, found.*
FROM edges
LEFT JOIN (
    SELECT *
    FROM lines
    UNION ALL
    SELECT false, NULL, NULL, model, sum(tokens)::bigint, sum(calls)::bigint, sum(tokens)::bigint, NULL
    FROM sums
    WHERE per_million IS NULL
    GROUP BY model
) AS found ON true
ORDER BY is_line DESC, bucket, cost DESC, tokens DESC, model COLLATE "C", user_id COLLATE "C";
