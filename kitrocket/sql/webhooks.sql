-- name: store_event
-- Stores a delivery, or counts one more of a known event, which is then locked.
-- $1 webhook id, $2 type, $3 subscription, $4 payment, $5 customer, $6 the user its metadata names, $7 event time,
-- $8 now, $9 SHA-256 of the body, $10 the body.
INSERT INTO kitrocket.webhook_events AS known (
    webhook_id, type, subscription_id, payment_id, customer_id, user_hint, event_at, received_at, body_sha256, payload,
    state, attempts, deliveries, hook_state, hook_attempts
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'received', 0, 1, 'none', 0)
ON CONFLICT (webhook_id) DO UPDATE SET deliveries = known.deliveries + 1
RETURNING
    webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id,
    CASE WHEN known.deliveries > 1 THEN known.payload END AS payload;

-- name: take_event
-- Locks a stored event unless another process has it. $1 webhook id.
SELECT webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id, payload
FROM kitrocket.webhook_events
WHERE webhook_id = $1
FOR UPDATE SKIP LOCKED;

-- name: wait_for_event
-- Locks a stored event. $1 webhook id.
SELECT webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id, payload
FROM kitrocket.webhook_events
WHERE webhook_id = $1
FOR UPDATE;

-- name: settle_event
-- Notes what became of an event. The e-mail address stays only while the user is missing.
-- $1 webhook id, $2 state, $3 reason, $4 user, $5 e-mail, $6 attempts, $7 next attempt, $8 error, $9 finished.
UPDATE kitrocket.webhook_events
SET
    state = $2, reason = $3, user_id = coalesce($4, user_id), customer_email = $5, attempts = $6, next_attempt_at = $7,
    last_error = $8, finished_at = coalesce(finished_at, $9)
WHERE webhook_id = $1
RETURNING webhook_id;

-- name: events_to_retry
-- Unfinished events that are due, and parked or dead ones whose missing user or payment has appeared, oldest first.
-- $1 now.
SELECT e.webhook_id
FROM kitrocket.webhook_events e
WHERE
    e.payload IS NOT NULL
    AND (
        (e.state IN ('received', 'parked') AND e.next_attempt_at <= $1)
        OR (
            e.state IN ('parked', 'dead') AND e.reason = 'no_user'
            AND EXISTS (SELECT 1 FROM users u WHERE u.id = e.user_hint)
        )
        OR (
            e.state IN ('parked', 'dead') AND e.reason IN ('no_user', 'ambiguous_user') AND e.user_hint IS NULL
            AND (
                EXISTS (
                    SELECT 1 FROM kitrocket.dodo_subscriptions m
                    WHERE m.subscription_id = e.subscription_id AND m.user_id IS NOT NULL
                )
                OR 1 = (
                    SELECT count(*)
                    FROM (
                        SELECT m.user_id FROM kitrocket.dodo_subscriptions m
                        WHERE m.customer_id = e.customer_id AND m.user_id IS NOT NULL
                        UNION
                        SELECT s.user_id FROM subscriptions s WHERE s.dodo_customer_id = e.customer_id
                    ) AS candidates
                )
                OR (
                    e.reason = 'no_user'
                    AND EXISTS (
                        SELECT 1 FROM users u
                        WHERE lower(u.email) = e.customer_email AND u.email_verified IS NOT NULL
                    )
                )
            )
        )
        OR (
            e.state IN ('parked', 'dead') AND e.reason = 'unknown_payment'
            AND EXISTS (
                SELECT 1 FROM kitrocket.dodo_payments p WHERE p.payment_id = e.payment_id AND p.status IS NOT NULL
            )
        )
    )
ORDER BY e.event_at, e.webhook_id;

-- name: events_of_unknown_kind
-- Events parked for a product or a status that was not known, with their bodies, oldest first.
SELECT webhook_id, payload
FROM kitrocket.webhook_events
WHERE state IN ('parked', 'dead') AND reason IN ('unknown_product', 'unknown_status') AND payload IS NOT NULL
ORDER BY event_at, webhook_id;
