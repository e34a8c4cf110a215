-- How single calls reach the provider that bills them, through kitrocket.usage_outbox: a row for each call that it has
-- not accepted yet, put there by a trigger in the transaction that records the call.
-- A claim leases rows for a while and counts as an attempt; what it later says about a row holds only if the row was not
-- claimed again meanwhile. Deleting needs no such proof: the provider has the call, whoever told it.

-- name: trigger
-- Read whether calls are put into the outbox: 'O' when they are, 'D' when that is switched off, no row without a trigger.
SELECT tgenabled::text AS state
FROM pg_trigger
WHERE tgrelid = 'public.usage'::regclass
  AND tgname = 'kitrocket_write_outbox';

-- name: claim
-- Lease due rows, the longest due first, and read what to send. A call that was deleted comes without tokens, one of a
-- user without a customer at the provider without a customer. A live subscription's customer comes first.
-- $1 now, $2 until when they are leased, $3 the most of them.
-- By place and by LIMIT 1, so that it never reads more of a table than these rows, however long the backlog is.
WITH claimed AS (
    UPDATE kitrocket.usage_outbox
    SET next_at = $2, attempts = attempts + 1
    WHERE ctid = ANY (ARRAY(
        SELECT ctid
        FROM kitrocket.usage_outbox
        WHERE state = 'pending'
          AND next_at <= $1
        ORDER BY next_at
        LIMIT $3::bigint
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING usage_id, attempts
)
SELECT claimed.usage_id, claimed.attempts, call.tokens, call.model, call.created_at, customer.customer_id
FROM claimed
LEFT JOIN LATERAL (
    SELECT user_id, tokens_used AS tokens, model, created_at
    FROM usage
    WHERE id = claimed.usage_id
    LIMIT 1
) AS call ON true
LEFT JOIN LATERAL (
    SELECT dodo_customer_id AS customer_id
    FROM subscriptions
    WHERE user_id = call.user_id
      AND dodo_customer_id IS NOT NULL
    ORDER BY status IN ('active', 'trialing', 'past_due') DESC, created_at DESC, id
    LIMIT 1
) AS customer ON true
ORDER BY call.created_at, claimed.usage_id;

-- name: forget
-- Delete rows whose calls the provider has, or which were deleted here, and answer with their ids. One that is locked
-- stays, here and below: another exporter looks at it or has it by now, or it goes with its user. Who never waits is in no
-- deadlock.
-- $1 usage ids.
DELETE FROM kitrocket.usage_outbox
WHERE ctid = ANY (ARRAY(
    SELECT ctid
    FROM kitrocket.usage_outbox
    WHERE usage_id = ANY ($1::text[])
    FOR UPDATE SKIP LOCKED
))
RETURNING usage_id;

-- name: postpone
-- Make rows due later.
-- $1 usage ids and $2 the attempts at which they were claimed, arrays of one length; $3 when they are due, $4 why.
UPDATE kitrocket.usage_outbox
SET next_at = $3, error = $4
WHERE ctid = ANY (ARRAY(
    SELECT outbox.ctid
    FROM unnest($1::text[], $2::integer[]) AS claimed (usage_id, attempts)
    JOIN kitrocket.usage_outbox AS outbox USING (usage_id, attempts)
    FOR UPDATE OF outbox SKIP LOCKED
));

-- name: park
-- Take rows out of the way until somebody looks at them.
-- $1 usage ids and $2 the attempts at which they were claimed, arrays of one length; $3 why.
UPDATE kitrocket.usage_outbox
SET state = 'parked', error = $3
WHERE ctid = ANY (ARRAY(
    SELECT outbox.ctid
    FROM unnest($1::text[], $2::integer[]) AS claimed (usage_id, attempts)
    JOIN kitrocket.usage_outbox AS outbox USING (usage_id, attempts)
    FOR UPDATE OF outbox SKIP LOCKED
));

-- name: unpark
-- Make parked rows due, and count them.
-- $1 now.
WITH back AS (
    UPDATE kitrocket.usage_outbox
    SET state = 'pending', next_at = $1, error = NULL
    WHERE state = 'parked'
    RETURNING true
)
SELECT count(*) AS unparked
FROM back;

-- name: parked
-- List parked rows, the oldest first.
-- $1 the most of them.
SELECT usage_id, user_id, created_at, attempts, error
FROM kitrocket.usage_outbox
WHERE state = 'parked'
ORDER BY created_at, usage_id
LIMIT $1::bigint;

-- name: backlog
-- Count what is not accepted yet. The oldest is the time of the first call that waits for more than its user's customer.
SELECT count(*) FILTER (WHERE state = 'pending') AS pending,
       count(*) FILTER (WHERE state = 'pending' AND error = 'no customer') AS waiting,
       count(*) FILTER (WHERE state = 'parked') AS parked,
       min(created_at) FILTER (WHERE state = 'pending' AND error IS DISTINCT FROM 'no customer') AS oldest
FROM kitrocket.usage_outbox;
